"""Schedules validation by the number of training images, and at the end."""

from __future__ import annotations

import sys

from lightning import Callback, Trainer

from ldm_lab.training.callbacks.every import Every
from ldm_lab.training.stage_module import StageModule
from ldm_lab.utils.limits import Count

NEVER = sys.maxsize  # batches


class Validate(Callback):
    """Schedules validations: Lightning counts batches, so this callback sets that interval to 1 when one is due.

    Args:
        every_images: interval in training images; the last step always has a validation.
    """

    def __init__(self, every_images: Count) -> None:
        self.every = Every(every_images)
        self._decided: tuple[tuple[int, int], bool] = ((-1, -1), False)

    def on_train_start(self, trainer: Trainer, module: StageModule) -> None:
        """Start the interval at the number of images seen so far."""
        self.every.start(module)

    def on_train_batch_end(self, trainer: Trainer, module: StageModule, *_: object) -> None:
        """Set the interval for the batch that has just ended; Lightning reads it after this hook."""
        trainer.val_check_batch = 1 if self.due(trainer, module) else NEVER

    def due(self, trainer: Trainer, module: StageModule) -> bool:
        """Whether a validation follows the batch that has just ended; repeated calls give the same answer."""
        place = (module.images_seen, trainer.global_step)
        if self._decided[0] != place:
            due = self.every.due(trainer, module) or trainer.global_step >= trainer.max_steps
            self._decided = (place, due)
        return self._decided[1]

"""When validation runs: counted in images, and at the end."""

from __future__ import annotations

import sys

from lightning import Callback, Trainer

from ldm_lab.training.callbacks.every import Every
from ldm_lab.training.stage_module import StageModule
from ldm_lab.utils.limits import Count

NEVER = sys.maxsize  # batches


class Validate(Callback):
    """Lightning counts batches between validations; this sets its interval to one batch when one is due.

    Args:
        every_images: interval in training images; the last step is validated whatever it is.
    """

    def __init__(self, every_images: Count) -> None:
        self.every = Every(every_images)

    def on_train_start(self, trainer: Trainer, module: StageModule) -> None:
        """Begin to count."""
        self.every.start(module)

    def on_train_batch_end(self, trainer: Trainer, module: StageModule, *_: object) -> None:
        """Decide for the batch that has just ended: Lightning looks at the interval after this hook."""
        due = self.every.due(trainer, module) or trainer.global_step >= trainer.max_steps
        trainer.val_check_batch = 1 if due else NEVER

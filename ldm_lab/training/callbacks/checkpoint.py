"""Saving the state of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning import Callback, Trainer

from ldm_lab.training.callbacks.every import Every
from ldm_lab.training.checkpoint_io import place
from ldm_lab.training.stage_module import StageModule


class Checkpoint(Callback):
    """Write `last.ckpt` every so many images and at the end; the one before stays as `previous.ckpt`.

    Args:
        folder: `checkpoints/` of the stage.
        every_images: interval in training images.
    """

    def __init__(self, folder: str, every_images: int) -> None:
        self.folder, self.every = Path(folder), Every(every_images)

    @property
    def last(self) -> Path:
        """The newest state."""
        return self.folder / "last.ckpt"

    def on_train_start(self, trainer: Trainer, module: StageModule) -> None:
        """Begin to count."""
        self.every.start(module)
        if trainer.is_global_zero:
            for stale in self.folder.glob(".*.tmp"):  # what a killed process was writing
                stale.unlink()

    def on_train_batch_end(self, trainer: Trainer, module: StageModule, *_: Any) -> None:  # noqa: ANN401
        """Save when due, and at the last step, before its validation."""
        finished = trainer.global_step >= trainer.max_steps
        if self.every.due(trainer, module) or finished:
            self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        """Write now; every rank must call it. Until the new file is whole the old one keeps its name."""
        if trainer.is_global_zero and self.last.is_file():
            place(self.last, self.folder / "previous.ckpt")
        for logger in trainer.loggers:
            if hasattr(logger, "flush"):
                logger.flush()  # what was measured before this state is never measured again
        trainer.save_checkpoint(self.last)

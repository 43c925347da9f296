"""Saving the state of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning import Callback, Trainer

from ldm_lab.checkpoints import checkpoint
from ldm_lab.training.callbacks.every import Every
from ldm_lab.training.callbacks.validate import Validate
from ldm_lab.training.loggers.run_logger import run_loggers
from ldm_lab.training.stage_module import StageModule
from ldm_lab.utils.limits import Count


class Checkpoint(Callback):
    """Write `last.ckpt` every so many images and at the end; the one before stays as `previous.ckpt`.

    Training goes on while a file is written. Where that fails it stops at the next step with one line: hours that
    nothing keeps are worse.

    Args:
        folder: `checkpoints/` of the stage.
        every_images: interval in training images.
        validate: when validation runs.
    """

    def __init__(self, folder: str, every_images: Count, validate: Validate) -> None:
        self.folder, self.every, self.validate = Path(folder), Every(every_images), validate

    @property
    def last(self) -> Path:
        """The newest state."""
        return self.folder / checkpoint.LAST

    def on_train_start(self, trainer: Trainer, module: StageModule) -> None:
        """Begin to count."""
        self.every.start(module)

    def on_train_batch_end(self, trainer: Trainer, module: StageModule, *_: Any) -> None:  # noqa: ANN401
        """Save when due, and before a validation, which `Interrupt` may break off; the last step has one."""
        trainer.strategy.checkpoint_io.check()
        if self.every.due(trainer, module) or self.validate.due(trainer, module):
            self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        """Begin to write now; every rank must call it. Until the new file is whole the old one keeps its name."""
        trainer._logger_connector.update_train_step_metrics()  # of this step; Lightning's own turn comes too late
        for logger in run_loggers(trainer):
            logger.flush()  # a resumed run measures nothing again that was measured before this state
        trainer.save_checkpoint(self.last)

    def on_train_end(self, trainer: Trainer, module: StageModule) -> None:
        """What was said to be saved is."""
        trainer.strategy.checkpoint_io.wait()

    def on_exception(self, trainer: Trainer, module: StageModule, exception: BaseException) -> None:
        """Finish the file, but not where the user will not wait."""
        if isinstance(exception, KeyboardInterrupt):
            trainer.strategy.checkpoint_io.abandon()
        else:
            trainer.strategy.checkpoint_io.wait()

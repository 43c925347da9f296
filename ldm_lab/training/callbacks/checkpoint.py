"""Saves training checkpoints."""

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
    """Writes `last.ckpt` every so many images and at the end; the checkpoint before stays as `previous.ckpt`.

    Training goes on while a file is written. If writing fails, training stops at the next step with a one-line error:
    hours of training that no file keeps would be worse.

    Args:
        folder: `checkpoints/` of the stage.
        every_images: interval in training images.
        validate: when validation runs.
    """

    def __init__(self, folder: str, every_images: Count, validate: Validate) -> None:
        self.folder, self.every, self.validate = Path(folder), Every(every_images), validate

    @property
    def last(self) -> Path:
        """Path of the newest checkpoint."""
        return self.folder / checkpoint.LAST

    def on_train_start(self, trainer: Trainer, module: StageModule) -> None:
        """Start the interval at the number of images seen so far."""
        self.every.start(module)

    def on_train_batch_end(self, trainer: Trainer, module: StageModule, *_: Any) -> None:  # noqa: ANN401
        """Save when due, and before each validation, as `Interrupt` may break it off; the last step validates."""
        trainer.strategy.checkpoint_io.check()
        if self.every.due(trainer, module) or self.validate.due(trainer, module):
            self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        """Start writing now; every rank must call this. The old file keeps its name until the new file is complete."""
        trainer._logger_connector.update_train_step_metrics()  # this step's; Lightning itself updates them too late
        for logger in run_loggers(trainer):
            logger.flush()  # a resumed run logs no row again from before this checkpoint
        trainer.save_checkpoint(self.last)

    def on_train_end(self, trainer: Trainer, module: StageModule) -> None:
        """Wait until the last checkpoint is on disk."""
        trainer.strategy.checkpoint_io.wait()

    def on_exception(self, trainer: Trainer, module: StageModule, exception: BaseException) -> None:
        """Finish writing the checkpoint; after Ctrl-C abandon the write, as the user will not wait."""
        if isinstance(exception, KeyboardInterrupt):
            trainer.strategy.checkpoint_io.abandon()
        else:
            trainer.strategy.checkpoint_io.wait()

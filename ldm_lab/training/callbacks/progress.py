"""Progress bar of training: images, images per second, loss, time left."""

from __future__ import annotations

import sys
import time

from lightning import Callback, Trainer
from torch import Tensor
from tqdm import tqdm

from ldm_lab.training.stage_module import StageModule


class Progress(Callback):
    """Shows a bar for training and a short bar for each validation, on rank 0.

    If the output is a file, it writes a line every half minute.
    """

    SHOW_LOSS_EVERY = 1.0  # seconds: reading the loss waits for the device

    def __init__(self) -> None:
        self._bar: tqdm | None = None
        self._validation: tqdm | None = None
        self._shown = 0.0

    def on_train_start(self, trainer: Trainer, module: StageModule) -> None:
        """Open the bar at the number of images seen so far."""
        if trainer.is_global_zero:
            total = trainer.max_steps * trainer.datamodule.global_batch_size
            self._bar = tqdm(
                desc=module.stage, total=total, initial=module.images_seen, unit="img", unit_scale=True,
                smoothing=0.05, mininterval=0.5 if sys.stderr.isatty() else 30, dynamic_ncols=True,
            )  # fmt: skip

    def on_train_batch_end(
        self, trainer: Trainer, module: StageModule, outputs: dict[str, Tensor], batch: dict, batch_idx: int
    ) -> None:
        """Advance the bar; read the loss now and then."""
        if self._bar is None:
            return
        whole_step = module.images_seen % trainer.datamodule.global_batch_size == 0
        if whole_step and time.monotonic() - self._shown > self.SHOW_LOSS_EVERY:
            self._shown = time.monotonic()
            self._bar.set_postfix(loss=f"{float(module.terms['loss']):.3f}", refresh=False)
        self._bar.update(module.images_seen - self._bar.n)

    def on_validation_start(self, trainer: Trainer, module: StageModule) -> None:
        """Open the short bar."""
        if self._bar is not None and sys.stderr.isatty():
            self._validation = tqdm(desc="validation", total=sum(trainer.num_val_batches), leave=False, unit="batch")

    def on_validation_batch_end(self, trainer: Trainer, module: StageModule, *_: object) -> None:
        """Advance the short bar."""
        if self._validation is not None:
            self._validation.update()

    def on_validation_end(self, trainer: Trainer, module: StageModule) -> None:
        """Close the short bar; the time of the validation does not count as training time."""
        if self._validation is not None:
            self._validation.close()
            self._validation = None

    def on_exception(self, trainer: Trainer, module: StageModule, exception: BaseException) -> None:
        """Close the bars, so that the error message begins on a new line."""
        self.on_validation_end(trainer, module)
        self.on_train_end(trainer, module)

    def on_train_end(self, trainer: Trainer, module: StageModule) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

"""Ctrl-C and SIGTERM: stop between two steps, with everything saved."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

import torch
from lightning import Callback, Trainer

from ldm_lab.training.callbacks.checkpoint import Checkpoint
from ldm_lab.training.stage_module import StageModule

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupt(Callback):
    """On the first signal finish the step, save and stop; on the second stop at once.

    With several ranks all must stop after the same step, or the others wait for ever: they compare notes
    every `EVERY` steps. A signal in the last step, or later, lets the stage come to its end.
    """

    EVERY = 8

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def setup(self, trainer: Trainer, module: StageModule, stage: str) -> None:
        """Note who has the signals: when training starts, Lightning has already taken some."""
        self._before = {number: signal.getsignal(number) for number in SIGNALS}

    def on_train_start(self, trainer: Trainer, module: StageModule) -> None:
        """Take over the signals while training runs."""
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = number
        print("\nstopping after this step, once more to stop at once", flush=True)

    def on_train_batch_end(
        self, trainer: Trainer, module: StageModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Save and stop where a signal came in."""
        if module.images_seen % trainer.datamodule.global_batch_size or trainer.global_step >= trainer.max_steps:
            return
        if (trainer.world_size > 1 and trainer.global_step % self.EVERY) or not self._agreed(trainer, module):
            return
        for callback in trainer.callbacks:
            if isinstance(callback, Checkpoint):
                callback.save(trainer)
        trainer.should_stop = True
        trainer.limit_val_batches = 0  # or Lightning validates before it stops

    def on_train_end(self, trainer: Trainer, module: StageModule) -> None:
        """Let all ranks know of a late signal: none of them goes on to the next stage."""
        self._agreed(trainer, module)

    def _agreed(self, trainer: Trainer, module: StageModule) -> bool:
        if trainer.world_size == 1:
            return self.received is not None  # and no wait for the device
        flag = torch.tensor(float(self.received or 0), device=module.device)
        agreed = int(trainer.strategy.reduce(flag, reduce_op="max"))
        self.received = agreed or None
        return bool(agreed)

    def teardown(self, trainer: Trainer, module: StageModule, stage: str) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

"""Stops training between two steps, with a checkpoint saved, on a signal or when a callback asks for it."""

from __future__ import annotations

import signal
import sys
import time
from types import FrameType

import torch
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, Timer
from lightning.pytorch.trainer.states import TrainerFn

from ldm_lab.training.callbacks.checkpoint import Checkpoint
from ldm_lab.training.stage_module import StageModule
from ldm_lab.utils.signals import BROKEN_PIPE, Interrupted, heeded
from ldm_lab.utils.terminal import cry

NOT_REPEATED = (getattr(signal, "SIGHUP", None), BROKEN_PIPE)  # their sender is gone, so a repeat is no new request


class BrokenOff(Exception):  # noqa: N818  it is no error
    """A validation was broken off: the checkpoint precedes it, and the next start runs the validation again."""


class Interrupt(Callback):
    """On the first signal finishes the step, saves and stops; on the second signal stops at once.

    All ranks must stop after the same step, whichever rank got the signal, or the rest would wait forever: the ranks
    exchange their signals every `EVERY` steps. A signal breaks off a running validation and drops the final one.

    If a callback on any rank sets `trainer.should_stop`, training stops likewise, but a running validation completes.
    Lightning alone would stop in the middle of a step, and validate when no validation is due.

    Attributes:
        received: the signal that this rank, or after an exchange any rank, has got; None: no signal.
    """

    EVERY = 8
    # A launcher forwards a signal that the whole process group has got already, so one request arrives twice. Only
    # Ctrl-C is repeated by a person.
    ONE_REQUEST = 5.0  # seconds
    NO_SIGNAL = 0.5  # stands for a callback's request where ranks compare signal numbers

    def __init__(self) -> None:
        self.received: int | None = None
        self._first: float | None = None  # when this rank got a signal
        self._speaks = False
        self._least = 0  # steps before a callback may end the training: `trainer.min_steps`
        self._before = {number: signal.getsignal(number) for number in heeded()}

    def setup(self, trainer: Trainer, module: StageModule, stage: str) -> None:
        """Let Lightning stop only where `_stop` allows it, and give each start the full `max_time`."""
        if stage != TrainerFn.FITTING:
            return
        loop = trainer.fit_loop.epoch_loop
        self._least, loop.min_steps = loop.min_steps or 0, sys.maxsize
        for callback in trainer.callbacks:
            if isinstance(callback, Timer):  # a restored Timer would stop the next start at once
                callback.load_state_dict = lambda state: None

    def on_train_start(self, trainer: Trainer, module: StageModule) -> None:
        """Install the signal handlers."""
        self._speaks = trainer.is_global_zero
        for number in self._before:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._first is None:
            self.received, self._first = self.received or number, now
            if self._speaks:
                name = signal.Signals(number).name
                cry(f"\n{name}: stopping after this step\n")
        elif number not in NOT_REPEATED and (number == signal.SIGINT or now - self._first > self.ONE_REQUEST):
            raise Interrupted(number)

    def on_train_batch_end(
        self, trainer: Trainer, module: StageModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Save and stop if a signal or a callback asks for it; at the last step ignore callbacks, as training ends."""
        if module.images_seen % trainer.datamodule.global_batch_size:
            return
        wish = self._asked(trainer, trainer.global_step)
        if not wish or (wish == self.NO_SIGNAL and trainer.global_step >= trainer.max_steps):
            return
        for callback in trainer.callbacks:
            if isinstance(callback, Checkpoint):
                callback.save(trainer)
        self._stop(trainer)
        trainer.limit_val_batches = 0  # or Lightning validates before it stops

    def on_validation_batch_start(
        self, trainer: Trainer, module: StageModule, batch: object, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Break off the validation if there is a signal."""
        if self._asked(trainer, batch_idx) > self.NO_SIGNAL:
            raise BrokenOff

    def on_validation_end(self, trainer: Trainer, module: StageModule) -> None:
        """Stop if the validation gave a callback a reason to ask; the checkpoint was saved before the validation."""
        if trainer.state.fn == TrainerFn.FITTING and self._asked(trainer, count=0):
            self._stop(trainer)

    def _stop(self, trainer: Trainer) -> None:
        trainer.should_stop = True
        trainer.fit_loop.epoch_loop.min_steps, trainer.fit_loop.min_epochs = None, 0

    def _asked(self, trainer: Trainer, count: int) -> float:
        """The request to stop, if any (see `agree`); all ranks must call this with the same `count`."""
        if trainer.world_size == 1:
            return self._wish(trainer)  # without waiting for the device
        return 0.0 if count % self.EVERY else self.agree(trainer)

    def _wish(self, trainer: Trainer) -> float:
        asked = trainer.should_stop and trainer.global_step >= self._least
        return float(self.received or self.NO_SIGNAL * asked)

    def agree(self, trainer: Trainer) -> float:
        """Share a request to stop with all ranks; the ranks wait for each other.

        Returns:
            The signal, the same on all ranks; `NO_SIGNAL`: a callback asks to stop; 0: no request.
        """
        wish = torch.tensor(self._wish(trainer), device=trainer.strategy.root_device)
        wish = float(trainer.strategy.reduce(wish, reduce_op="max"))
        self.received = self.received or int(wish) or None  # a signal may have arrived during the reduction
        return wish

    def reason(self, trainer: Trainer) -> str:
        """Why training has stopped early without a signal."""
        for callback in trainer.callbacks:
            if isinstance(callback, EarlyStopping) and callback.stopping_reason_message:
                message = callback.stopping_reason_message.removesuffix("Signaling Trainer to stop.")
                return f"EarlyStopping: {' '.join(message.split()).rstrip('.')}"
            if isinstance(callback, Timer) and (left := callback.time_remaining()) is not None and left <= 0:
                return "the time of trainer.max_time is over"
        return "a callback has set trainer.should_stop"

    def teardown(self, trainer: Trainer, module: StageModule, stage: str) -> None:
        """Restore the signal handlers."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def on_exception(self, trainer: Trainer, module: StageModule, exception: BaseException) -> None:
        """Restore the signal handlers, as Lightning skips `teardown` here and changes the handler of Ctrl-C."""
        self.teardown(trainer, module, "fit")


def without_own_handlers(trainer: Trainer) -> None:
    """Disables Lightning's signal handlers, and its broadcast of SIGTERM to all ranks in every step.

    Lightning's SIGTERM handler waits for the other ranks in the middle of a step, so a signal to one rank causes a
    deadlock. Under Slurm its SIGUSR1 handler saves a checkpoint that no run would look for.
    """
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]

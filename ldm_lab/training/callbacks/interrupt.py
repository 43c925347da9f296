"""A signal, or a callback that asks for an end: stop between two steps, with everything saved."""

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

NOT_REPEATED = (getattr(signal, "SIGHUP", None), BROKEN_PIPE)  # out of impatience: whoever asked is gone


class BrokenOff(Exception):  # noqa: N818  it is no error
    """A validation ends here: the state was saved before it, and the next start makes up for it."""


class Interrupt(Callback):
    """On the first signal finish the step, save and stop; on the second stop at once.

    With several ranks all must stop after the same step, whichever has got the signal, or the others wait for
    ever: they compare notes every `EVERY` steps. A validation is not waited for, nor is it done after the last step.

    The same where a callback, of whatever rank, sets `trainer.should_stop`, but that a validation comes to its end.
    Lightning would stop in the middle of a step, and validate where no validation is due.

    Attributes:
        received: the signal, of this rank or (where they have compared notes) another; None: no signal.
    """

    EVERY = 8
    # A launcher passes on what the whole group has got already, so that one request comes twice. Of Ctrl-C it is a
    # person who repeats it.
    ONE_REQUEST = 5.0  # seconds
    NO_SIGNAL = 0.5  # where ranks compare the numbers of signals: a callback asks

    def __init__(self) -> None:
        self.received: int | None = None
        self._first: float | None = None  # when this rank got a signal
        self._speaks = False
        self._least = 0  # steps before a callback may end the training: `trainer.min_steps`
        self._before = {number: signal.getsignal(number) for number in heeded()}

    def setup(self, trainer: Trainer, module: StageModule, stage: str) -> None:
        """Let Lightning stop where `_stop` allows it, and give each start the whole of `max_time`."""
        if stage != TrainerFn.FITTING:
            return
        loop = trainer.fit_loop.epoch_loop
        self._least, loop.min_steps = loop.min_steps or 0, sys.maxsize
        for callback in trainer.callbacks:
            if isinstance(callback, Timer):  # who counts on would end the next start where the first has ended
                callback.load_state_dict = lambda state: None

    def on_train_start(self, trainer: Trainer, module: StageModule) -> None:
        """Take over the signals while training runs."""
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
        """Save and stop where somebody has asked for it; the last step ends the training anyway."""
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
        """Break a validation off, for a signal."""
        if self._asked(trainer, batch_idx) > self.NO_SIGNAL:
            raise BrokenOff

    def on_validation_end(self, trainer: Trainer, module: StageModule) -> None:
        """Stop where a validation gave the reason to; the state was saved before it."""
        if trainer.state.fn == TrainerFn.FITTING and self._asked(trainer, count=0):
            self._stop(trainer)

    def _stop(self, trainer: Trainer) -> None:
        trainer.should_stop = True
        trainer.fit_loop.epoch_loop.min_steps, trainer.fit_loop.min_epochs = None, 0

    def _asked(self, trainer: Trainer, count: int) -> float:
        """Who asks for an end, at a place that all ranks pass with the same `count`: see `agree`."""
        if trainer.world_size == 1:
            return self._wish(trainer)  # and no wait for the device
        return 0.0 if count % self.EVERY else self.agree(trainer)

    def _wish(self, trainer: Trainer) -> float:
        asked = trainer.should_stop and trainer.global_step >= self._least
        return float(self.received or self.NO_SIGNAL * asked)

    def agree(self, trainer: Trainer) -> float:
        """Let all ranks know of what any of them was asked; they wait for each other.

        Returns:
            The signal, the same on all ranks; `NO_SIGNAL`: a callback asks; 0: nobody does.
        """
        wish = torch.tensor(self._wish(trainer), device=trainer.strategy.root_device)
        wish = float(trainer.strategy.reduce(wish, reduce_op="max"))
        self.received = self.received or int(wish) or None  # one may have come in while the others were waited for
        return wish

    def reason(self, trainer: Trainer) -> str:
        """Why a training has ended before its end, without a signal."""
        for callback in trainer.callbacks:
            if isinstance(callback, EarlyStopping) and callback.stopping_reason_message:
                said = callback.stopping_reason_message.removesuffix("Signaling Trainer to stop.")
                return f"EarlyStopping: {' '.join(said.split()).rstrip('.')}"
            if isinstance(callback, Timer) and (left := callback.time_remaining()) is not None and left <= 0:
                return "the time of trainer.max_time is over"
        return "a callback has set trainer.should_stop"

    def teardown(self, trainer: Trainer, module: StageModule, stage: str) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def on_exception(self, trainer: Trainer, module: StageModule, exception: BaseException) -> None:
        """Give them back where Lightning does not come to `teardown`, nor leaves Ctrl-C as it was."""
        self.teardown(trainer, module, "fit")


def without_own_handlers(trainer: Trainer) -> None:
    """Keep Lightning's hands off the signals, and from asking all ranks about them in every step.

    Its handler of SIGTERM waits for the other ranks in the middle of a step, so that a signal to one of them is the
    end of all progress; under Slurm its handler of SIGUSR1 saves where nobody looks for it.
    """
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]

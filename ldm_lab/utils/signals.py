"""Signals that ask a process to stop: raises, delays and reports them."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
from collections.abc import Iterator
from types import FrameType

# Ctrl-C, the signals that schedulers send before the end, and a closed terminal; Windows has only the first two.
STOPPING = tuple(signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, name))


class Interrupted(KeyboardInterrupt):
    """A signal has asked this process to stop.

    Attributes:
        number: number of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


BROKEN_PIPE = getattr(signal, "SIGPIPE", signal.SIGTERM)  # stands for a closed output pipe


def status_of(number: int) -> int:
    """Exit status of a process that a signal stopped: 130 Ctrl-C, 138 SIGUSR1, 143 SIGTERM (Linux)."""
    return 128 + number


def heeded() -> list[signal.Signals]:
    """The signals `STOPPING`, without SIGHUP if the parent process has set it to be ignored, as `nohup` does."""
    return [n for n in STOPPING if n.name != "SIGHUP" or signal.getsignal(n) is not signal.SIG_IGN]


def listen() -> None:
    """Make the signals `STOPPING` raise `Interrupted`, until the process ends."""
    for number in heeded():
        signal.signal(number, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    if _held is None or _held.process != os.getpid():
        raise Interrupted(number)
    _held.received = _held.received or number


@dataclasses.dataclass
class _Held:
    """A delayed signal, valid only in the process that delays it, not in its children."""

    process: int
    received: int | None = None


_held: _Held | None = None


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Delays signals: a signal inside the block raises `Interrupted` at the end of the block.

    For code that loses exceptions, such as the start of a process: Python only prints an exception in the hooks of
    `os.fork`, so the signal would be lost.
    """
    global _held
    outer, _held = _held, _Held(os.getpid())
    try:
        yield
    finally:
        inner, _held = _held, outer
        if inner.received:
            _interrupt(inner.received, None)


def cause_of(error: BaseException | None) -> KeyboardInterrupt | None:
    """The Ctrl-C or signal that caused an error, as when a clean-up fails after a signal; None if there is none."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error

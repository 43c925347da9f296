"""The signals that ask a process to stop: which they are, how they are raised, held back and reported."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
from collections.abc import Iterator
from types import FrameType

# Ctrl-C, what schedulers send ahead of the end, and a terminal that is closed; Windows has but the first two.
STOPPING = tuple(signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, name))


class Interrupted(KeyboardInterrupt):
    """One of the signals that ask for an end has come in.

    Attributes:
        number: which.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


BROKEN_PIPE = getattr(signal, "SIGPIPE", signal.SIGTERM)  # stands for output that nobody reads any more


def status_of(number: int) -> int:
    """The exit status that tells shells and schedulers of a signal: 130 Ctrl-C, 138 SIGUSR1, 143 SIGTERM (Linux)."""
    return 128 + number


def heeded() -> list[signal.Signals]:
    """The signals `STOPPING`; not SIGHUP where whoever started this process lets it be ignored, as `nohup` does."""
    return [n for n in STOPPING if n.name != "SIGHUP" or signal.getsignal(n) is not signal.SIG_IGN]


def listen() -> None:
    """Let the signals `STOPPING` raise `Interrupted`, from here to the end of the process."""
    for number in heeded():
        signal.signal(number, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    if _held is None or _held.process != os.getpid():
        raise Interrupted(number)
    _held.received = _held.received or number


@dataclasses.dataclass
class _Held:
    """Where a signal waits, in the process that holds it back and not in those that it starts meanwhile."""

    process: int
    received: int | None = None


_held: _Held | None = None


@contextlib.contextmanager
def held() -> Iterator[None]:
    """A signal that comes in meanwhile raises `Interrupted` at the end of the block, and nowhere inside.

    For what loses an exception, as the start of a process does: Python only prints what is raised in the hooks of
    `os.fork`, and the signal would have asked in vain.
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
    """The Ctrl-C or signal of which an error is a consequence, as where a clean-up has failed; None: of none."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error

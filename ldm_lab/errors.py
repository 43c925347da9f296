"""How a command ends that cannot go on: one line for the user instead of a traceback."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

# Ctrl-C, and what schedulers send ahead of the end; Windows has no SIGUSR1.
STOPPING = tuple(signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))


class UserError(ValueError):
    """Something that the user can mend; the message is one line that names the key, the value found, and what to do."""


class Interrupted(KeyboardInterrupt):
    """One of the signals that ask for an end has come in.

    Attributes:
        number: which.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def status_of(number: int) -> int:
    """The exit status that tells shells and schedulers of a signal: 130 Ctrl-C, 138 SIGUSR1, 143 SIGTERM (Linux)."""
    return 128 + number


def one_line(error: BaseException) -> str:
    """An exception's message on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def fail(error: Exception) -> NoReturn:
    """End with one line on stderr, and the error's notes below it; `LDM_LAB_TRACEBACK=1` shows where it came from."""
    if os.environ.get("LDM_LAB_TRACEBACK"):
        raise error
    sys.exit("\n  ".join([f"error: {one_line(error)}", *getattr(error, "__notes__", ())]))


def listen() -> None:
    """Let the signals `STOPPING` raise `Interrupted`, from here to the end of the process."""
    for number in STOPPING:
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


@contextlib.contextmanager
def ended_by(*errors: type[Exception]) -> Iterator[None]:
    """`with ended_by(ValueError):` such an error, or Ctrl-C, ends the process with one line."""
    try:
        yield
    except BaseException as error:
        # Lightning answers Ctrl-C with an exit, and its clean-up fails where little was there to clean up.
        if (cause := cause_of(error)) is not None:
            print("stopped", file=sys.stderr)
            sys.exit(status_of(getattr(cause, "number", signal.SIGINT)))
        if isinstance(error, errors):
            fail(error)
        raise

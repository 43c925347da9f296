"""How a command ends that cannot go on: one line for the user instead of a traceback."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

# Ctrl-C, and what schedulers send ahead of the end; Windows has no SIGUSR1.
STOPPING = tuple(signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))


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


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise Interrupted(number)


@contextlib.contextmanager
def ended_by(*errors: type[Exception]) -> Iterator[None]:
    """`with ended_by(ValueError):` such an error, or Ctrl-C, ends the process with one line."""
    try:
        yield
    except errors as error:
        fail(error)
    except (KeyboardInterrupt, SystemExit) as end:
        cause = end if isinstance(end, KeyboardInterrupt) else end.__context__  # Lightning answers it with an exit
        if not isinstance(cause, KeyboardInterrupt):
            raise
        print("stopped", file=sys.stderr)
        sys.exit(status_of(getattr(cause, "number", signal.SIGINT)))

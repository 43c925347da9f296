"""How a command ends that cannot go on: one line for what the user can mend, a traceback for a fault of code."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from typing import NoReturn

from ldm_lab.utils.signals import BROKEN_PIPE, cause_of, status_of

# `OSError`s of processes and connections, which no file causes.
NO_FILE = (ConnectionError, ChildProcessError, ProcessLookupError, BlockingIOError)


class UserError(ValueError):
    """Something that the user can mend; the message is one line that names the key, the value found, and what to do."""

    def __init__(self, message: str = "") -> None:
        super().__init__(own_line(message))


def own_line(message: str) -> str:
    """The message of an exception; a loader's worker hands its traceback over, whose last line holds the message."""
    if not message.startswith("Caught ") or "\nOriginal Traceback" not in message:
        return message
    return message.strip().splitlines()[-1].partition(": ")[2]


def first_line(error: BaseException) -> str:
    """The first line of an exception's message: torch's go on with a stack, others with advice."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def one_line(error: BaseException) -> str:
    """An exception's message on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def fail(error: Exception, line: str | None = None) -> NoReturn:
    """End with one line on stderr, and the error's notes below it; `LDM_LAB_TRACEBACK=1` shows where it came from.

    Args:
        error: why.
        line: what to say; None: its message.
    """
    if os.environ.get("LDM_LAB_TRACEBACK"):
        raise error
    sys.exit("\n  ".join([f"error: {line or one_line(error)}", *getattr(error, "__notes__", ())]))


@contextlib.contextmanager
def doing(what: str) -> Iterator[None]:
    """`with doing("building model.unet"):` an exception that leaves the block knows this, see `reporting`."""
    try:
        yield
    except Exception as error:
        error.__dict__.setdefault("doing", []).append(what)
        raise


@contextlib.contextmanager
def reporting(what: str) -> Iterator[None]:
    """Around a whole command: how its exceptions end the process.

    A `UserError`, a file that the system refuses (`OSError`), Ctrl-C and signals: with one line. Any other exception is
    a fault of code and keeps its traceback; a line before it says what was being done.

    Args:
        what: the command does, such as "running train.py".
    """
    try:
        with doing(what):
            yield
    except BaseException as error:
        # Lightning answers Ctrl-C with an exit, and its clean-up fails where little was there to clean up.
        if (cause := cause_of(error)) is not None:
            number = getattr(cause, "number", signal.SIGINT)
            if number != BROKEN_PIPE:  # nobody reads, and nobody asks
                print("stopped", file=sys.stderr)
            sys.exit(status_of(number))
        if isinstance(error, UserError):
            fail(error)
        if not isinstance(error, Exception):
            raise
        doings = ", ".join(f"while {one}" for one in error.__dict__["doing"])
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, NO_FILE):
            fail(error, f"{error.filename or 'a file'}: {error.strerror} ({doings})")
        print(f"unexpected {type(error).__name__} {doings}:", file=sys.stderr, flush=True)
        raise

"""Ends a failed command: with one line for an error that the user can fix, with a traceback for a bug."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from typing import NoReturn

from ldm_lab.utils.signals import BROKEN_PIPE, cause_of, status_of

# `OSError`s of processes and connections, not of files.
NO_FILE = (ConnectionError, ChildProcessError, ProcessLookupError, BlockingIOError)


class UserError(ValueError):
    """An error that the user can fix; the one-line message names the key, the value found and the remedy."""

    def __init__(self, message: str = "") -> None:
        super().__init__(own_line(message))


def own_line(message: str) -> str:
    """An exception's message, without a loader worker's traceback, whose last line holds the message."""
    if not message.startswith("Caught ") or "\nOriginal Traceback" not in message:
        return message
    return message.strip().splitlines()[-1].partition(": ")[2]


def first_line(error: BaseException) -> str:
    """The first line of an exception's message; torch's messages go on with a stack, others with advice."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def one_line(error: BaseException) -> str:
    """An exception's message on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def fail(error: Exception, line: str | None = None) -> NoReturn:
    """Exit with one line on stderr and the error's notes below it; `LDM_LAB_TRACEBACK=1` shows the traceback.

    Args:
        error: the cause.
        line: the line to print; None: the error's message.
    """
    if os.environ.get("LDM_LAB_TRACEBACK"):
        raise error
    sys.exit("\n  ".join([f"error: {line or one_line(error)}", *getattr(error, "__notes__", ())]))


@contextlib.contextmanager
def doing(what: str) -> Iterator[None]:
    """`with doing("building model.unet"):` adds this text to exceptions that leave the block, for `reporting`."""
    try:
        yield
    except Exception as error:
        error.__dict__.setdefault("doing", []).append(what)
        raise


@contextlib.contextmanager
def reporting(what: str) -> Iterator[None]:
    """Context of a whole command: ends the process after an exception.

    A `UserError`, an `OSError` on a file, Ctrl-C and signals exit with one line. Any other exception is a bug and keeps
    its traceback; a line before it names the current activity.

    Args:
        what: activity of the command, such as "running train.py".
    """
    try:
        with doing(what):
            yield
    except BaseException as error:
        # Lightning turns Ctrl-C into an exit, and its clean-up may fail early in a run.
        if (cause := cause_of(error)) is not None:
            number = getattr(cause, "number", signal.SIGINT)
            if number != BROKEN_PIPE:  # nobody reads the output
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

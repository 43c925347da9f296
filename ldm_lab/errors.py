"""How a command ends that cannot go on: one line for what the user can mend, a traceback for a fault of code."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

# Ctrl-C, what schedulers send ahead of the end, and a terminal that is closed; Windows has but the first two.
STOPPING = tuple(signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, name))

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

"""Standard output and error that fail nobody: names that cannot be printed, readers and terminals that are gone."""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any, TextIO

from ldm_lab.utils.signals import BROKEN_PIPE, Interrupted

log = logging.getLogger(__name__)


def is_first_process() -> bool:
    """Whether this process may write; known before any process group exists."""
    return not any(int(os.environ.get(key) or 0) for key in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))


def say(line: str) -> None:
    """Print once, not once a rank."""
    if is_first_process():
        print(line, flush=True)


@functools.cache
def say_once(line: str) -> None:
    """Warn, unless this very line was said before: a training opens and writes many files."""
    log.warning(line)


class Output(io.FileIO):
    """What cannot be written is lost, and the command goes on: a full disk, or a terminal that was closed.

    A pipe whose reader is gone, as that of `| head -1`, asks this process to stop, as SIGTERM would, with the status of
    SIGPIPE: training saves and stops. What is written after that is lost.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self._process = os.getpid()

    def write(self, data: Any) -> int:  # noqa: ANN401
        """Write `data`, or seem to."""
        try:
            return super().write(data)
        except BlockingIOError:
            raise
        except OSError as error:
            if error.errno in (errno.EPIPE, errno.EIO):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self.fileno())
                os.close(nowhere)
            if error.errno == errno.EPIPE and os.getpid() == self._process:
                ask_to_stop()
            return len(data)


def ask_to_stop() -> None:
    """Do what SIGTERM does here; only the main thread can."""
    if threading.current_thread() is threading.main_thread():
        handler = signal.getsignal(signal.SIGTERM)
        if not callable(handler):
            raise Interrupted(BROKEN_PIPE)
        handler(BROKEN_PIPE, None)


def cry(text: str) -> None:
    """Write on standard error past `print`, which may be what a signal has interrupted, or waits for a lock."""
    with contextlib.suppress(OSError, AttributeError):  # the terminal is gone, or was closed from the start
        os.write(sys.__stderr__.fileno(), text.encode(errors="backslashreplace"))


@contextlib.contextmanager
def lenient() -> Iterator[None]:
    """`sys.stdout` and `sys.stderr` as above, inside the block; characters that they have no code for are escaped."""
    before = {name: stream for name in ("stdout", "stderr") if (stream := getattr(sys, name))}  # some are closed
    for name, stream in before.items():
        setattr(sys, name, _lenient(stream))
    try:
        yield
    finally:
        for name, stream in before.items():
            with contextlib.suppress(Interrupted):  # all is done
                getattr(sys, name).flush()
            setattr(sys, name, stream)


def _lenient(stream: TextIO) -> TextIO:
    buffer = getattr(stream, "buffer", None)  # of `python -u` a file without a buffer
    if not isinstance(getattr(buffer, "raw", buffer), io.FileIO):  # a notebook's, or a console of Windows
        return stream
    stream.flush()
    output = Output(stream.fileno())
    buffered = output if buffer is getattr(buffer, "raw", buffer) else io.BufferedWriter(output)
    how = {"line_buffering": stream.line_buffering, "write_through": stream.write_through}
    return io.TextIOWrapper(buffered, stream.encoding, "backslashreplace", **how)

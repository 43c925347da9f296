"""Robust standard output and error: unprintable characters, closed pipes and closed terminals raise no exception."""

from __future__ import annotations

import contextlib
import errno
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
    """Whether this is the first process, which alone prints and writes; known before any process group exists."""
    return not any(int(os.environ.get(key) or 0) for key in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))


def say(line: str) -> None:
    """Print a line on the first process only."""
    if is_first_process():
        print(line, flush=True)


def say_once(line: str) -> None:
    """Log a warning once per text, as training opens and writes many files, in several threads."""
    mine = object()
    if said_once.setdefault(line, mine) is mine:  # no lock, which a forked process would find taken
        log.warning(line)


said_once: dict[str, object] = {}  # lines that this process has logged


class Output(io.FileIO):
    """Output that cannot be written (full disk, closed terminal) is lost, and the command goes on.

    A pipe without a reader, as after `| head -1`, asks this process to stop, as SIGTERM would, with the status of
    SIGPIPE: training saves and stops. Output after that is lost.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self._process = os.getpid()

    def write(self, data: Any) -> int:  # noqa: ANN401
        """Write `data`; on an error discard it and report success."""
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
    """Call the handler of SIGTERM; only the main thread can."""
    if threading.current_thread() is threading.main_thread():
        handler = signal.getsignal(signal.SIGTERM)
        if not callable(handler):
            raise Interrupted(BROKEN_PIPE)
        handler(BROKEN_PIPE, None)


def cry(text: str) -> None:
    """Write to standard error without `print`, as a signal may have interrupted a `print`, which holds a lock."""
    with contextlib.suppress(OSError, AttributeError):  # closed terminal
        os.write(sys.__stderr__.fileno(), text.encode(errors="backslashreplace"))


@contextlib.contextmanager
def lenient() -> Iterator[None]:
    """Make `sys.stdout` and `sys.stderr` an `Output` inside the block; escapes characters that cannot be encoded."""
    before = {name: stream for name in ("stdout", "stderr") if (stream := getattr(sys, name))}  # None if closed
    for name, stream in before.items():
        setattr(sys, name, _lenient(stream))
    try:
        yield
    finally:
        for name, stream in before.items():
            with contextlib.suppress(Interrupted):  # the command is done
                getattr(sys, name).flush()
            setattr(sys, name, stream)


def _lenient(stream: TextIO) -> TextIO:
    buffer = getattr(stream, "buffer", None)  # `python -u` has an unbuffered file
    if not isinstance(getattr(buffer, "raw", buffer), io.FileIO):  # a notebook or a Windows console
        return stream
    stream.flush()
    output = Output(stream.fileno())
    buffered = output if buffer is getattr(buffer, "raw", buffer) else io.BufferedWriter(output)
    how = {"line_buffering": stream.line_buffering, "write_through": stream.write_through}
    return io.TextIOWrapper(buffered, stream.encoding, "backslashreplace", **how)

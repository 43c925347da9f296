"""No process outlives the training it belongs to: what ends one of them ends all, and its rank is named."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from typing import ClassVar, NoReturn

import torch

from ldm_lab.utils.errors import fail, one_line
from ldm_lab.utils.signals import BROKEN_PIPE, STOPPING, status_of
from ldm_lab.utils.terminal import cry

STOPPED = frozenset(map(status_of, (*STOPPING, BROKEN_PIPE)))  # exit statuses of who was asked to stop


class Watch(threading.Thread):
    """Looks after the other processes of this machine beside whatever this one does, or waits for.

    A process that waits for one that is gone may wait for ever: in NCCL, in a rendezvous, for data. So this thread
    ends it from outside. The launching process watches those it has launched, and they watch it.

    Args:
        rank: of this process.
        children: the processes launched by this one, rank by rank after its own.
        parent: the process that has launched this one, if it is to be watched.
        parent_name: what to call that.
    """

    INTERVAL = 0.5  # seconds
    GRACE = 3.0  # seconds in which a process may follow one that has ended in order
    current: ClassVar[Watch | None] = None  # of this process

    def __init__(self, rank: int, children: list[subprocess.Popen], parent: int | None, parent_name: str) -> None:
        super().__init__(name="watch", daemon=True)
        self.rank, self.children, self.parent, self.parent_name = rank, children, parent, parent_name
        self.over = threading.Event()

    def start(self) -> None:
        """Begin, as the one watch of this process."""
        Watch.current = self
        super().start()

    def run(self) -> None:
        """Look until something has failed, or all is over."""
        while not self.over.wait(self.INTERVAL):
            for rank, child in enumerate(self.children, self.rank + 1):
                if status := child.poll():
                    self._end(f"rank {rank} {_said(status)}", status)
            if self.parent is not None and os.getppid() != self.parent:
                self._end(f"{self.parent_name} is gone, and so rank {self.rank} ends")

    def _end(self, line: str, status: int | None = None) -> None:
        """End this process and all that it has started, from within this thread."""
        orderly = status is None or status in STOPPED
        if orderly and self.over.wait(self.GRACE):  # that this process ends by itself is likely
            return
        try:
            cry(f"\nerror: {line}\n")
            for process in (*self.children, *multiprocessing.active_children()):
                process.kill()
        finally:
            os._exit(status if status in STOPPED else 1)


def _said(status: int) -> str:
    """What became of a process, from the status that `Popen` gives."""
    if status < 0:
        return f"was killed by {signal.Signals(-status).name}"
    return f"ended with exit status {status}; what it said stands above"


PATIENCE = 20.0  # seconds for the watch, or torchrun, or Slurm, to say who is missing


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Around all that several processes do together: where one fails, it is the one whose error is read.

    The others fail in consequence, with a lost connection. They leave the word to who knows of whom: the watch, or
    the launcher, which then end them.
    """
    try:
        yield
    except BaseException as error:
        if _is_lost_connection(error):
            _await_the_end(error)
        if Watch.current:
            Watch.current.over.set()  # whoever fails now, it follows from this
        raise


def _is_lost_connection(error: BaseException) -> bool:
    if not isinstance(error, RuntimeError) or not torch.distributed.is_available():
        return False
    return isinstance(error, torch.distributed.DistError) or "/gloo/" in str(error)  # has no class of its own


def _await_the_end(error: BaseException) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # by which torchrun ends those that are left
    time.sleep(PATIENCE)
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else os.environ.get("RANK", "?")
    fail(RuntimeError(f"rank {rank} has lost the connection to another one: {one_line(error)}"))

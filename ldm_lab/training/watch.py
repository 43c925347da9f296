"""Ends all processes of a distributed training when one of them fails, and names the failed rank."""

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

STOPPED = frozenset(map(status_of, (*STOPPING, BROKEN_PIPE)))  # exit statuses of processes stopped by a signal


class Watch(threading.Thread):
    """A thread that watches the other processes of this training on this machine.

    A process that waits for a dead process may wait forever: in NCCL, in a rendezvous, for data. So this thread ends
    its own process. The launching process watches its children, and the children watch the launching process.

    Args:
        rank: rank of this process.
        children: processes that this process has launched, in the order of the ranks after its own.
        parent: process id of the launching process; None: do not watch it.
        parent_name: name of the launching process in messages.
    """

    INTERVAL = 0.5  # seconds
    GRACE = 3.0  # seconds to end by itself after another process has stopped in order
    current: ClassVar[Watch | None] = None  # the one watch of this process

    def __init__(self, rank: int, children: list[subprocess.Popen], parent: int | None, parent_name: str) -> None:
        super().__init__(name="watch", daemon=True)
        self.rank, self.children, self.parent, self.parent_name = rank, children, parent, parent_name
        self.over = threading.Event()

    def start(self) -> None:
        """Start the thread as the watch of this process."""
        Watch.current = self
        super().start()

    def run(self) -> None:
        """Poll the processes until one has failed or training is over."""
        while not self.over.wait(self.INTERVAL):
            for rank, child in enumerate(self.children, self.rank + 1):
                if status := child.poll():
                    self._end(f"rank {rank} {_said(status)}", status)
            if self.parent is not None and os.getppid() != self.parent:
                self._end(f"{self.parent_name} is gone, and so rank {self.rank} ends")

    def _end(self, line: str, status: int | None = None) -> None:
        """End this process and all processes that it has started."""
        orderly = status is None or status in STOPPED
        if orderly and self.over.wait(self.GRACE):  # this process probably ends by itself
            return
        try:
            cry(f"\nerror: {line}\n")
            for process in (*self.children, *multiprocessing.active_children()):
                process.kill()
        finally:
            os._exit(status if status in STOPPED else 1)


def _said(status: int) -> str:
    """How a process ended, in words, from the return code of `Popen`."""
    if status < 0:
        return f"was killed by {signal.Signals(-status).name}"
    return f"ended with exit status {status}; what it said stands above"


PATIENCE = 20.0  # seconds for the watch, torchrun or Slurm to name the failed process


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Context of all work in a process group: only the process that fails first reports its error.

    The other processes then fail with a lost connection. They stay silent and wait for the watch or the launcher, which
    knows the failed process and ends them.
    """
    try:
        yield
    except BaseException as error:
        if _is_lost_connection(error):
            _await_the_end(error)
        if Watch.current:
            Watch.current.over.set()  # later failures follow from this one
        raise


def _is_lost_connection(error: BaseException) -> bool:
    if not isinstance(error, RuntimeError) or not torch.distributed.is_available():
        return False
    return isinstance(error, torch.distributed.DistError) or "/gloo/" in str(error)  # gloo's error has no class


def _await_the_end(error: BaseException) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torchrun ends the remaining processes by SIGTERM
    time.sleep(PATIENCE)
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else os.environ.get("RANK", "?")
    fail(RuntimeError(f"rank {rank} has lost the connection to another one: {one_line(error)}"))

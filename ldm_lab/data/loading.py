"""Loaders whose workers outlive signals, leave none behind, and take no more shared memory than there is."""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.data import DataLoader, default_collate, get_worker_info

from ldm_lab.utils.errors import UserError
from ldm_lab.utils.signals import STOPPING, held
from ldm_lab.utils.terminal import say_once

SHARED = "/dev/shm"  # where Linux keeps what processes share
ADVICE = "give it more (docker run --shm-size=8g), or use data.num_workers=0"
ROOM = 4  # batches for each worker that must fit in what is free: others look at the same moment


class Loader(DataLoader):
    """A loader whose workers are all there, or none, when a signal is heeded."""

    def __iter__(self) -> Iterator[Any]:
        """Start the workers."""
        with held():
            batches = super().__iter__()
        return (batch.join() if isinstance(batch, Apart) else batch for batch in batches)


class Collate:
    """Makes a batch of items; where shared memory has no room for those of all workers, the parent does.

    A worker that finds too little of it sends the items through a pipe, which is slower: Docker gives 64 MB, and a
    worker that takes more is killed.

    Args:
        join: makes the batch.
    """

    def __init__(self, join: Callable[[Any], Any] = default_collate) -> None:
        self.join = join

    def __call__(self, items: Any) -> Any:  # noqa: ANN401
        """The batch, or the items `Apart`."""
        worker = get_worker_info()
        size = sum(leaf.nbytes for leaf in tree_leaves(items) if isinstance(leaf, Tensor))
        if worker is None or ROOM * worker.num_workers * size <= free():
            return self.join(items)
        own = tree_map_only(Tensor, torch.clone, items)  # of a view, all of its storage would be sent
        return Apart(self.join, pickle.dumps(own))


@dataclass(frozen=True)
class Apart:
    """The items of a batch on their way through a pipe: as bytes, or torch would put them into shared memory."""

    make: Callable[[Any], Any]
    items: bytes

    def join(self) -> Any:  # noqa: ANN401
        """The batch."""
        say_once(f"{SHARED} has no room for the images of all loaders, which now come on a slower way: {ADVICE}")
        return self.make(pickle.loads(self.items))


def free() -> int:
    """Bytes of shared memory that are free; very many where the system does not say."""
    return shutil.disk_usage(SHARED).free if os.path.isdir(SHARED) else sys.maxsize


@contextlib.contextmanager
def enough_shared_memory() -> Iterator[None]:
    """Around work with loaders. Raises `UserError` where one has died of a lack of shared memory all the same."""
    try:
        yield
    except RuntimeError as error:
        if not re.search(r"shared memory|Bus error|</torch_", f"{error} {error.__cause__}"):
            raise
        raise UserError(f"a loader found no room in shared memory, {SHARED}: {ADVICE}") from error


def leave_signals_to_parent(_: int) -> None:
    """What is sent to a whole group of processes is not for its loaders: training must find them alive for its step.

    The parent itself may end them by SIGTERM, and does where it ends in haste.
    """
    for number in STOPPING:
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # which tells the sender; macOS has no such thing
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)

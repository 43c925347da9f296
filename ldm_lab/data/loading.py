"""Data loaders that survive signals, leave no workers behind, and never exceed shared memory."""

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

SHARED = "/dev/shm"  # Linux's shared memory
ADVICE = "give it more (docker run --shm-size=8g), or use data.num_workers=0"
ROOM = 4  # free space needed, in batches per worker, as all workers check at the same time


class Loader(DataLoader):
    """A loader that starts its workers without being interrupted by a signal."""

    def __iter__(self) -> Iterator[Any]:
        """Start the workers and yield batches."""
        with held():
            batches = super().__iter__()
        return (batch.join() if isinstance(batch, Apart) else batch for batch in batches)


class Collate:
    """Collates items into a batch; if shared memory is too small for all workers, the parent collates.

    A worker with too little shared memory sends the items through a pipe, which is slower: Docker gives 64 MB, and the
    system kills a worker that takes more.

    Args:
        join: collates items into a batch.
    """

    def __init__(self, join: Callable[[Any], Any] = default_collate) -> None:
        self.join = join

    def __call__(self, items: Any) -> Any:  # noqa: ANN401
        """The batch, or the pickled items as `Apart`."""
        worker = get_worker_info()
        size = sum(leaf.nbytes for leaf in tree_leaves(items) if isinstance(leaf, Tensor))
        if worker is None or ROOM * worker.num_workers * size <= free():
            return self.join(items)
        copies = tree_map_only(Tensor, torch.clone, items)  # a view would be pickled with its whole storage
        return Apart(self.join, pickle.dumps(copies))


@dataclass(frozen=True)
class Apart:
    """Pickled items of a batch for a pipe; they are bytes, as torch would put tensors into shared memory."""

    make: Callable[[Any], Any]
    items: bytes

    def join(self) -> Any:  # noqa: ANN401
        """Collate the items in the parent."""
        say_once(f"{SHARED} has no room for the images of all loaders, which now come on a slower way: {ADVICE}")
        return self.make(pickle.loads(self.items))


def free() -> int:
    """Free bytes of shared memory; a huge number if unknown."""
    return shutil.disk_usage(SHARED).free if os.path.isdir(SHARED) else sys.maxsize


@contextlib.contextmanager
def enough_shared_memory() -> Iterator[None]:
    """Context of work with loaders. Raises `UserError` if a worker still died of a lack of shared memory."""
    try:
        yield
    except RuntimeError as error:
        if not re.search(r"shared memory|Bus error|</torch_", f"{error} {error.__cause__}"):
            raise
        raise UserError(f"a loader found no room in shared memory, {SHARED}: {ADVICE}") from error


def leave_signals_to_parent(_: int) -> None:
    """Makes a loader worker ignore signals sent to the process group, as training needs it to finish the step.

    Only the parent can end the worker, by SIGTERM, as it does when it stops at once.
    """
    for number in STOPPING:
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # it returns the sender; missing on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)

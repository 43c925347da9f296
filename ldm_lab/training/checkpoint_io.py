"""Lightning's door to `ldm_lab.checkpoints.checkpoint`, and files that have two names."""

from __future__ import annotations

import errno
import io
import os
import shutil
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from ldm_lab.checkpoints import checkpoint
from ldm_lab.training.host_copy import HostCopy
from ldm_lab.utils.terminal import say_once
from ldm_lab.utils.writing import flush, replacing


class BackgroundCheckpointIO(TorchCheckpointIO):
    """Writes whole files or none, while training goes on; reads without running anything they hold.

    Training waits until its state is copied to host memory, which takes that memory once, for as long as it runs;
    where so much is not free, it waits for the disk instead. Of a file that could not be written it hears from
    `check` or `wait`. One file is written at a time: saving waits for the one before.
    """

    def __init__(self) -> None:
        self._copy, self._thread = HostCopy(), ThreadPoolExecutor(max_workers=1)
        self._writing: Future[None] | None = None
        self._stop = threading.Event()
        self._whole: Path | None = None  # the newest file that this process has read or written

    def save_checkpoint(
        self, checkpoint_state: dict[str, Any], path: str | Path, storage_options: object = None
    ) -> None:
        """Begin to write. Raises `SaveError` where the write before this one has failed."""
        self.wait()
        if self._copy.fits(checkpoint_state):
            self._writing = self._thread.submit(self._write, self._copy.take(checkpoint_state), Path(path))
        else:
            say_once("host memory has no room for a copy of the state: training waits while a checkpoint is written")
            self._write(checkpoint_state, Path(path))

    def _write(self, state: dict[str, Any], path: Path) -> None:
        with replacing(path) as temporary:
            with io.BufferedWriter(Output(temporary, self._stop)) as file:
                torch.save(state, file)
            flush(temporary)
            if path == self._whole and path.is_file():  # a damaged one must not push out the good one before it
                place(path, path.with_name(checkpoint.PREVIOUS))
        self._whole = path

    def check(self) -> None:
        """Raise `SaveError` if a write has failed; does not wait."""
        if self._writing and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Wait until nothing is being written. Raises `SaveError` if it failed."""
        writing, self._writing = self._writing, None
        if writing:
            writing.result()

    def abandon(self) -> None:
        """Stop writing, now and for good; the file stays as it was."""
        self._stop.set()

    def load_checkpoint(self, path: str | Path, map_location: object = None, weights_only: bool | None = None) -> dict:
        """See `ldm_lab.checkpoints.checkpoint.load`."""
        state = checkpoint.load(path)
        self._whole = Path(path)
        return state


class Output(io.FileIO):
    """A file that takes no more once `stop` is set."""

    def __init__(self, path: Path, stop: threading.Event) -> None:
        super().__init__(path, "w")
        self.stop = stop

    def write(self, data: Any) -> int:  # noqa: ANN401
        """Write some of `data`. Raises `OSError` where it is to stop."""
        if self.stop.is_set():
            raise OSError(errno.ECANCELED, os.strerror(errno.ECANCELED))
        return super().write(data)


def place(source: Path, target: Path) -> None:
    """Give the file `source` a second name, at once: by a hard link where the disk has them, else as a copy.

    Raises:
        SaveError: the disk refused.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
        os.replace(temporary, target)
    except OSError:
        with replacing(target) as copied:
            shutil.copyfile(source, copied)
    finally:
        temporary.unlink(missing_ok=True)  # it stays where both were names of one file

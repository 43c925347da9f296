"""Lightning's checkpoint plugin: writes in the background, and keeps the checkpoint before the last."""

from __future__ import annotations

import errno
import io
import os
import shutil
import threading
from collections.abc import Callable
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
    """Writes checkpoints atomically in a background thread; reads them without executing code.

    Training waits only until its state is copied to host memory; the copy's memory is allocated once and kept. If the
    host has too little free memory, training waits for the disk instead. `check` and `wait` raise if a write has
    failed. Writes do not overlap: saving waits for the write before.
    """

    def __init__(self) -> None:
        self._copy, self._thread = HostCopy(), ThreadPoolExecutor(max_workers=1)
        self._writing: Future[None] | None = None
        self._stop = threading.Event()
        self.written: Callable[[Path], Any] | None = None  # called, in the background, after each write
        self._whole: Path | None = None  # the newest file known intact: this process read or wrote it

    def save_checkpoint(
        self, checkpoint_state: dict[str, Any], path: str | Path, storage_options: object = None
    ) -> None:
        """Start writing. Raises `SaveError` if the write before has failed."""
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
            if path == self._whole and path.is_file():  # a corrupt file must not replace a good one
                place(path, path.with_name(checkpoint.PREVIOUS))
        self._whole = path
        if self.written:
            self.written(path)

    def check(self) -> None:
        """Raise `SaveError` if a write has failed; does not wait."""
        if self._writing and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the write to end. Raises `SaveError` if it failed."""
        writing, self._writing = self._writing, None
        if writing:
            writing.result()

    def abandon(self) -> None:
        """Cancel this write and all later ones; the old file stays."""
        self._stop.set()

    def load_checkpoint(self, path: str | Path, map_location: object = None, weights_only: bool | None = None) -> dict:
        """See `ldm_lab.checkpoints.checkpoint.load`."""
        state = checkpoint.load(path)
        self._whole = Path(path)
        return state


class Output(io.FileIO):
    """A file whose writes fail once `stop` is set."""

    def __init__(self, path: Path, stop: threading.Event) -> None:
        super().__init__(path, "w")
        self.stop = stop

    def write(self, data: Any) -> int:  # noqa: ANN401
        """Write some of `data`. Raises `OSError` if `stop` is set."""
        if self.stop.is_set():
            raise OSError(errno.ECANCELED, os.strerror(errno.ECANCELED))
        return super().write(data)


def place(source: Path, target: Path) -> None:
    """Give the file `source` a second name atomically, by a hard link, or by a copy if the disk has no links.

    Raises:
        SaveError: the copy cannot be written.
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
        temporary.unlink(missing_ok=True)  # `os.replace` keeps it if both names are links to one file

"""Data set of the demo: aligned cartoon faces, drawn once on this machine and cached in a file."""

from __future__ import annotations

import functools
import logging
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from ldm_lab.data.dataset import ImageDataset, digest
from ldm_lab.data.drawing import REVISION
from ldm_lab.utils import cache_folder
from ldm_lab.utils.limits import Count, Whole
from ldm_lab.utils.writing import replacing, require_writable

log = logging.getLogger(__name__)


class AvatarImages(ImageDataset):
    """Cartoon heads and shoulders on a light background; image i is a function of (drawing_seed, i).

    The first `num_train` images are for training, the next `num_val` are held out. One file in
    `cache_dir` holds both; `prepare` draws it (about 11 ms per image and core); reading maps it into memory.

    Args:
        split: "train" or "val".
        cache_dir: folder of the drawn images; created if missing.
        image_size: pixels, one number or (height, width).
        num_train: number of training images.
        num_val: number of held-out images.
        drawing_seed: seed of the faces.
        flip: mirror half of the training images.
        seed: seed of the flips.
    """

    def __init__(
        self,
        split: str,
        cache_dir: str | Path,
        image_size: int | Sequence[int] = 64,
        num_train: Count = 4096,
        num_val: Count = 512,
        drawing_seed: Whole = 0,
        flip: bool = False,
        seed: Whole = 0,
    ) -> None:
        super().__init__(split, image_size, flip=flip, seed=seed)
        self.first, self.count = (0, num_train) if split == "train" else (num_train, num_val)
        self.shape = (num_train + num_val, max(self.image_size), max(self.image_size), 3)
        self.drawing_seed = drawing_seed
        self.file = cache_folder.local(cache_dir) / (
            f"avatars-{self.shape[0]}x{self.shape[1]}px-seed{drawing_seed}-r{REVISION}"
            f"-avatars{version('python-avatars')}-resvg{version('resvg-py')}.npy"
        )

    def __len__(self) -> int:
        return self.count

    def read(self, index: int) -> Image.Image:
        """Avatar `index` of the split, square."""
        if not 0 <= index < self.count:
            raise IndexError(f"image {index} of {self.count}")
        return Image.fromarray(self.drawings[self.first + index])

    def fingerprint(self) -> str:
        """The file's name and the split."""
        return digest([self.file.name, self.first, self.count])

    @functools.cached_property
    def drawings(self) -> np.ndarray:
        """All images of both splits, `(N, S, S, 3)`, uint8, memory-mapped; draws the file first if it is missing."""
        self.prepare()
        return np.load(self.file, mmap_mode="r")

    def prepare(self) -> None:
        """Draw the images, unless the complete file exists."""
        if self._is_whole():
            return
        count, size = self.shape[:2]
        require_writable(self.file.parent, "paths.cache=")
        # Written under another name and renamed: a concurrent process replaces the file by an equal one.
        with replacing(self.file) as temporary, open(temporary, "wb") as file:
            np.save(file, render(self.drawing_seed, count, size, processes=_usable_cores()))

    def _is_whole(self) -> bool:
        if not self.file.exists():
            return False
        try:
            pixels = np.load(self.file, mmap_mode="r")
        except (OSError, ValueError, EOFError):  # truncated, or another kind of file
            log.warning("%s is damaged: the avatars are drawn again", self.file)
            return False
        return pixels.shape == self.shape and pixels.dtype == np.uint8


def render(seed: int, count: int, size: int, processes: int) -> np.ndarray:
    """Draw `count` avatars with a progress bar: `(count, size, size, 3)`, uint8, the same for any `processes`."""
    processes = max(1, min(processes, count))
    images = np.empty((count, size, size, 3), np.uint8)
    with ExitStack() as stack:
        workers = [stack.enter_context(_drawing(seed, size, first, count, processes)) for first in range(processes)]
        for index in tqdm(range(count), desc="drawing avatars", unit="image"):
            pixels = workers[index % processes].stdout.read(images[index].nbytes)
            if len(pixels) < images[index].nbytes:
                raise RuntimeError(f"avatar {index} could not be drawn: its process has stopped (see above)")
            images[index] = np.frombuffer(pixels, np.uint8).reshape(size, size, 3)
    return images


@contextmanager
def _drawing(seed: int, size: int, first: int, stop: int, step: int) -> Iterator[subprocess.Popen]:
    """Context of a process that writes the pixels of every `step`-th avatar."""
    # Not multiprocessing, as its workers import the main script, and so torch and Lightning.
    command = [sys.executable, "-m", "ldm_lab.data.drawing", *map(str, (seed, size, first, stop, step))]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    # A new session keeps Ctrl-C away from it; this process ends it, without a traceback for each worker.
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, start_new_session=True) as process:
        try:
            yield process
        finally:
            process.kill()


def _usable_cores() -> int:
    """Cores that this process may run on, at most 16, as starting more processes costs more than it saves."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 16)

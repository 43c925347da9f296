"""Latents kept on disk: every training image is encoded once, and read back by memory map.

A cache is a folder `<paths.cache>/latents/<key>/`:

    meta.json             what it holds, in words; the key is its hash
    00000.safetensors ... `moments`, `(n, views, M, h, w)`: n images, as they are and (views = 2) mirrored
    00000.lock            while a process encodes that shard

A shard is there whole or not at all. What is missing is encoded by whoever comes, so that the ranks of a run, runs at
the same time and the jobs of a sweep share the work, and an interrupted one goes on where it was.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import filelock
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset

from ldm_lab.data.dataset import ImageDataset, digest
from ldm_lab.data.transforms import is_flipped
from ldm_lab.utils import shell
from ldm_lab.utils.errors import UserError, first_line
from ldm_lab.utils.reading import LoadError, check_plain, read_json
from ldm_lab.utils.writing import replacing, write_json

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
NAMES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}  # in safetensors
FORMAT = 1  # of the folder: another one is another key
MOST, LEAST, PARTS = 512, 16, 32  # images of a shard at most and at least; shards of a set in between
META, TENSOR = "meta.json", "moments"
KEY = re.compile(r"[0-9a-f]{16}")
OWN_FILE = re.compile(r"meta\.json|\d{5,}\.(safetensors|lock)|\.(meta\.json|\d{5,}\.safetensors)\.\d+\.tmp")


class Error(NamedTuple):
    """What lies between latents that are kept and those of float32, on some images of a shard.

    Attributes:
        relative_rms: of the moments.
        codes: part of the codes that are others.

    Both are NaN where they were not measured; the second also where the first stage has no codebook.
    """

    relative_rms: float = math.nan
    codes: float = math.nan


UNKNOWN = Error()


class LatentCache:
    """The latents of one data set, as one autoencoder makes them of it.

    Args:
        root: folder of all caches, `<paths.cache>/latents`.
        what: what decides about the latents, as plain data: autoencoder, images, transform, precision.
        count: N, how many images.
        shape: (views, M, h, w) of an image's moments (see `FirstStage.moments`).
        dtype: in which they are kept, one of `DTYPES`.

    Attributes:
        key: the name of the folder; changes with any of these.
        folder: where it lies, there or not.
    """

    def __init__(self, root: str | Path, what: dict[str, Any], count: int, shape: Sequence[int], dtype: str) -> None:
        self.count, self.shape, self.dtype = count, tuple(shape), dtype
        self.shard_size = min(MOST, max(LEAST, -(-count // PARTS)))
        layout = {"count": count, "shape": list(shape), "dtype": dtype, "shard_size": self.shard_size}
        self.meta = {"format": FORMAT, **what, **layout}
        self.key = digest([json.dumps(self.meta, sort_keys=True)])
        self.folder = shell.path(root) / self.key

    @property
    def shards(self) -> range:
        """Their numbers."""
        return range(-(-self.count // self.shard_size))

    def indices(self, shard: int) -> range:
        """The images of a shard."""
        return range(shard * self.shard_size, min(self.count, (shard + 1) * self.shard_size))

    def path(self, shard: int) -> Path:
        """The file of a shard."""
        return self.folder / f"{shard:05}.safetensors"

    def num_bytes(self, images: int) -> int:
        """What so many images take."""
        return images * torch.Size(self.shape).numel() * DTYPES[self.dtype].itemsize

    def missing(self) -> list[int]:
        """The shards that are not there yet."""
        try:
            there = set(os.listdir(self.folder))
        except FileNotFoundError:
            there = set()
        return [shard for shard in self.shards if self.path(shard).name not in there]

    def open_folder(self) -> None:
        """Make the folder, or check that it holds what its name stands for, and note that it is used.

        Raises:
            LoadError: it holds something else.
        """
        path = self.folder / META
        if not path.exists():
            write_json(path, self.meta)
        try:
            found = read_json(path)
        except LoadError as error:
            raise LoadError(f"{error}; {self._advice}") from error
        if found != self.meta:
            raise LoadError(f"{path}: describes other latents than those of its name; {self._advice}")
        with contextlib.suppress(OSError):  # of somebody else, and shared with us
            os.utime(path)

    @contextlib.contextmanager
    def claim(self, shard: int) -> Iterator[bool]:
        """`with cache.claim(shard) as mine:` where it is, nobody else encodes the shard, nor has anybody.

        The claim of a process ends with it, however that ends.
        """
        lock = filelock.FileLock(self.path(shard).with_suffix(".lock"), timeout=0)
        try:
            lock.acquire()
        except filelock.Timeout:
            yield False
            return
        try:
            mine = not self.path(shard).exists()
            if mine:  # left by one that was killed
                for leftover in self.folder.glob(f".{self.path(shard).name}.*.tmp"):
                    leftover.unlink()
            yield mine
        finally:
            if self.path(shard).exists():  # who comes now does not ask for a lock any more
                Path(lock.lock_file).unlink(missing_ok=True)
            lock.release()

    def write(self, shard: int, moments: Tensor, skipped: dict[int, str], error: Error = UNKNOWN) -> None:
        """Write a shard.

        Args:
            shard: its number; claimed.
            moments: `(n, views, M, h, w)`, float32, on the CPU.
            skipped: image -> the errors of the files that another one took the place of, a line each.
            error: of what is kept.

        Raises:
            UserError: a number is too large for the dtype, or not finite at all.
            SaveError: the disk refused.
        """
        kept = moments.to(DTYPES[self.dtype])
        if not kept.isfinite().all():
            if not moments.isfinite().all():
                raise UserError("the autoencoder makes latents that are not finite: it, or an image, is damaged")
            largest = f"{moments.abs().max().item():.3g}"
            raise UserError(f"data.latents_dtype={self.dtype}: latents of up to {largest} do not fit: use float32")
        kept = kept.contiguous()
        notes = {"rounding": f"{relative_rms(kept, moments):.2e}", "skipped": json.dumps(skipped)}
        notes |= {"crc32": checksum(kept), **{name: f"{value:.3e}" for name, value in error._asdict().items()}}
        with replacing(self.path(shard)) as temporary:
            save_file({TENSOR: kept}, temporary, metadata=notes)

    def open(self, shard: int) -> Shard:
        """Map a shard. Raises `LoadError` where it is missing, damaged or another; the message says what to do."""
        path, shape = self.path(shard), [len(self.indices(shard)), *self.shape]
        try:
            if not path.is_file():  # a pipe would be waited for
                raise LoadError("it is gone")
            with safe_open(path, "pt") as file:
                if list(file.keys()) != [TENSOR]:
                    raise LoadError(f"holds other tensors than {TENSOR!r}")
                moments, notes = file.get_slice(TENSOR), file.metadata() or {}
                if moments.get_shape() != shape or NAMES.get(moments.get_dtype()) != self.dtype:
                    found = f"{moments.get_dtype()} of {moments.get_shape()}"
                    raise LoadError(f"holds {found}, not {self.dtype} of {shape}")
                return Shard(moments, notes)
        except Exception as error:  # a damaged file makes the reader fail in several ways
            raise LoadError(f"{path}: cannot be used: {first_line(error)}; {self._advice}") from error

    @property
    def _advice(self) -> str:
        return f"python -m ldm_lab cache --prune {self.key} removes it, and the same command encodes again"


def relative_rms(found: Tensor, expected: Tensor) -> float:
    """‖found - expected‖ / ‖expected‖, in float32; 0 where nothing is expected."""
    return ((found.float() - expected).square().mean() / expected.square().mean()).sqrt().nan_to_num().item()


def checksum(moments: Tensor) -> str:
    """CRC-32 of a contiguous tensor's bytes, in hexadecimal digits."""
    return f"{zlib.crc32(moments.view(torch.uint8).numpy()):08x}"


def is_intact(path: Path) -> bool:
    """Whether a shard's numbers are those that were written; all of them are read."""
    try:
        with safe_open(path, "pt") as file:
            return checksum(file.get_tensor(TENSOR)) == (file.metadata() or {}).get("crc32")
    except Exception:  # a damaged file makes the reader fail in several ways
        return False


class Shard:
    """A shard that is mapped.

    Args:
        moments: of safetensors, `(n, views, M, h, w)`; a part is read where it is asked for.
        notes: what the file says beside them.

    Attributes:
        rounding: relative RMS error of the dtype.
        error: of precision and dtype together, where it was measured.
        skipped: image -> the errors of files that it took the place of, a line each.
    """

    def __init__(self, moments: Any, notes: dict[str, str]) -> None:  # noqa: ANN401
        self.moments = moments
        self.rounding = float(notes.get("rounding", "nan"))
        self.error = Error(*(float(notes.get(name, "nan")) for name in Error._fields))
        skipped = check_plain(json.loads(notes.get("skipped", "{}")), "skipped")
        self.skipped = {int(index): str(errors) for index, errors in skipped.items()}


class CachedLatents(Dataset):
    """What `images` are to training, with `moments` `(M, h, w)` in the place of `image` (see `ImageDataset`).

    `dataset[index, position]` is mirrored where the image would be. Shards are opened when first asked for, by each
    process for itself.

    Args:
        cache: all shards of which are there.
        images: what was encoded.
    """

    def __init__(self, cache: LatentCache, images: ImageDataset) -> None:
        self.cache = cache
        self.flip, self.seed, self.skips = images.flip, images.seed, images.on_error == "skip"
        self._shards: dict[int, Shard] = {}

    def __len__(self) -> int:
        return self.cache.count

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_shards": {}}  # a mapping is of one process

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        index, position = key if isinstance(key, tuple) else (key, None)
        number, place = divmod(index, self.cache.shard_size)
        shard = self.shard(number)
        mirrored = self.flip and position is not None and is_flipped(self.seed, position)
        errors = shard.skipped.get(index, "")
        item = {
            "moments": shard.moments[place, int(mirrored)],  # (M, h, w)
            "index": (index + len(errors.splitlines())) % len(self),  # the image that stands there
            "position": index if position is None else position,
        }
        return {**item, "skipped": errors} if self.skips else item

    def shard(self, number: int) -> Shard:
        """Shard `number`. Raises `LoadError` (see `LatentCache.open`), `UserError` for a file that may not be skipped.

        Shards may have been encoded by a run that passes over damaged files.
        """
        if number not in self._shards:
            shard = self.cache.open(number)
            if shard.skipped and not self.skips:
                error = next(iter(shard.skipped.values())).splitlines()[0]
                raise UserError(f"{error}; data.on_error=skip passes over such files")
            self._shards[number] = shard
        return self._shards[number]

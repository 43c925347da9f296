"""Latent cache on disk: every training image is encoded once, and read back by memory map.

A cache is a folder `<paths.cache>/latents/<key>/`:

    meta.json             description of the content; the key is its hash
        00000.safetensors ... `moments`, `(n, views, M, h, w)`: n images, original and (views = 2) mirrored
    00000.lock            while a process encodes that shard

Shards are written atomically. Any process encodes the missing shards, so the ranks of a run, concurrent runs and the
jobs of a sweep share the work, and an interrupted run goes on where it stopped.
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

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset

from ldm_lab.data.dataset import ImageDataset, digest
from ldm_lab.data.transforms import is_flipped
from ldm_lab.utils import shell
from ldm_lab.utils.errors import UserError, first_line
from ldm_lab.utils.locks import if_free
from ldm_lab.utils.reading import LoadError, check_plain, read_json
from ldm_lab.utils.writing import replacing, write_json

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
NAMES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}  # safetensors' names of dtypes
FORMAT = 1  # of the folder: part of the key
MOST, LEAST, PARTS = 512, 16, 32  # maximum and minimum images per shard; shards per data set in between
META, TENSOR = "meta.json", "moments"
KEY = re.compile(r"[0-9a-f]{16}")
OWN_FILE = re.compile(r"meta\.json|\d{5,}\.(safetensors|lock)|\.(meta\.json|\d{5,}\.safetensors)\.\d+\.tmp")


class Error(NamedTuple):
    """Error of stored latents against latents in float32, on some images of a shard.

    Attributes:
        relative_rms: relative RMS error of the moments.
        codes: fraction of the codes that change.

    Both are NaN if not measured; `codes` also if the first stage has no codebook.
    """

    relative_rms: float = math.nan
    codes: float = math.nan


UNKNOWN = Error()


class LatentCache:
    """The latents of one data set from one autoencoder.

    Args:
        root: folder of all caches, `<paths.cache>/latents`.
        what: plain data that determines the latents: autoencoder, images, transform, precision.
        count: N, number of images.
        shape: (views, M, h, w) of an image's moments (see `FirstStage.moments`).
        dtype: dtype on disk, one of `DTYPES`.

    Attributes:
        key: name of the folder; changes with every argument but `root`.
        folder: path of the cache; it may not exist yet.
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
        """The numbers of all shards."""
        return range(-(-self.count // self.shard_size))

    def indices(self, shard: int) -> range:
        """The image indices of a shard."""
        return range(shard * self.shard_size, min(self.count, (shard + 1) * self.shard_size))

    def path(self, shard: int) -> Path:
        """The file of a shard."""
        return self.folder / f"{shard:05}.safetensors"

    def num_bytes(self, images: int) -> int:
        """Bytes that so many images take."""
        return images * torch.Size(self.shape).numel() * DTYPES[self.dtype].itemsize

    def missing(self) -> list[int]:
        """The shards that do not exist yet."""
        try:
            there = set(os.listdir(self.folder))
        except FileNotFoundError:
            there = set()
        return [shard for shard in self.shards if self.path(shard).name not in there]

    def order(self, missing: list[int], part: float) -> list[int]:
        """The order in which a process encodes missing shards.

        Args:
            missing: numbers of the shards.
            part: fraction of all shards where the process begins, so that the ranks of a run begin apart.
        """
        first = int(len(self.shards) * part)
        return [shard for shard in missing if shard >= first] + [shard for shard in missing if shard < first]

    def share(self) -> None:
        """Give the shards of the folder to other machines, see `SharedLatentCache`."""

    def open_folder(self) -> None:
        """Make the folder, or check that its content matches its key, and update its time of last use.

        Raises:
            LoadError: the folder holds something else.
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
        with contextlib.suppress(OSError):  # the cache may belong to another user
            os.utime(path)

    @contextlib.contextmanager
    def claim(self, shard: int) -> Iterator[bool]:
        """`with cache.claim(shard) as claimed:` true if the shard is missing and no other process encodes it.

        A process's claim ends with the process, even if the process is killed.
        """
        lock = self.path(shard).with_suffix(".lock")
        with if_free(lock) as mine:
            claimed = mine and not self.path(shard).exists()
            if claimed:  # files of a killed process
                for leftover in self.folder.glob(f".{self.path(shard).name}.*.tmp"):
                    leftover.unlink()
            try:
                yield claimed
            finally:
                if mine and self.path(shard).exists():  # no later process will ask for this lock
                    lock.unlink(missing_ok=True)

    def write(self, shard: int, moments: Tensor, skipped: dict[int, str], error: Error = UNKNOWN) -> None:
        """Write a shard.

        Args:
            shard: number of the shard, which this process has claimed.
            moments: `(n, views, M, h, w)`, float32, on the CPU.
            skipped: image -> the errors of the skipped files that another file replaced, a line each.
            error: error of the stored latents.

        Raises:
            UserError: a number is too large for the dtype, or not finite.
            SaveError: the file cannot be written.
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
        """Memory-map a shard. Raises `LoadError`, with advice, if it is missing, corrupt or does not match."""
        path, shape = self.path(shard), [len(self.indices(shard)), *self.shape]
        try:
            if not path.is_file():  # reading a pipe would block
                raise LoadError("it is gone")
            with safe_open(path, "pt") as file:
                if list(file.keys()) != [TENSOR]:
                    raise LoadError(f"holds other tensors than {TENSOR!r}")
                moments, notes = file.get_slice(TENSOR), file.metadata() or {}
                if moments.get_shape() != shape or NAMES.get(moments.get_dtype()) != self.dtype:
                    found = f"{moments.get_dtype()} of {moments.get_shape()}"
                    raise LoadError(f"holds {found}, not {self.dtype} of {shape}")
                return Shard(moments, notes)
        except Exception as error:  # safetensors raises various errors on corrupt files
            raise LoadError(f"{path}: cannot be used: {first_line(error)}; {self._advice}") from error

    @property
    def _advice(self) -> str:
        return f"python -m ldm_lab cache --prune {self.key} removes it, and the same command encodes again"


def relative_rms(found: Tensor, expected: Tensor) -> float:
    """‖found - expected‖ / ‖expected‖, in float32; 0 if both norms are 0."""
    return ((found.float() - expected).square().mean() / expected.square().mean()).sqrt().nan_to_num().item()


def checksum(moments: Tensor) -> str:
    """CRC-32 of a contiguous tensor's bytes, in hexadecimal."""
    return f"{zlib.crc32(moments.view(torch.uint8).numpy()):08x}"


def is_intact(path: Path) -> bool:
    """Whether a shard's content matches its checksum; reads the whole file."""
    try:
        with safe_open(path, "pt") as file:
            return checksum(file.get_tensor(TENSOR)) == (file.metadata() or {}).get("crc32")
    except Exception:  # safetensors raises various errors on corrupt files
        return False


class Shard:
    """A memory-mapped shard.

    Args:
        moments: safetensors slice `(n, views, M, h, w)`, read on access.
        notes: metadata of the file.

    Attributes:
        rounding: relative RMS error of the dtype.
        error: error of precision and dtype together, if measured.
        skipped: image -> the errors of the skipped files that it replaces, a line each.
    """

    def __init__(self, moments: Any, notes: dict[str, str]) -> None:  # noqa: ANN401
        self.moments = moments
        self.rounding = float(notes.get("rounding", "nan"))
        self.error = Error(*(float(notes.get(name, "nan")) for name in Error._fields))
        skipped = check_plain(json.loads(notes.get("skipped", "{}")), "skipped")
        self.skipped = {int(index): str(errors) for index, errors in skipped.items()}


class CachedLatents(Dataset):
    """The training items of `images` with `moments` `(M, h, w)` instead of `image` (see `ImageDataset`).

    `dataset[index, position]` is mirrored exactly if the image would be. Each process opens a shard on its first
    access.

    Args:
        cache: a complete cache.
        images: the encoded data set.
    """

    def __init__(self, cache: LatentCache, images: ImageDataset) -> None:
        self.cache = cache
        self.flip, self.seed, self.skips = images.flip, images.seed, images.on_error == "skip"
        self._shards: dict[int, Shard] = {}

    def __len__(self) -> int:
        return self.cache.count

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_shards": {}}  # memory maps belong to one process

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        index, position = key if isinstance(key, tuple) else (key, None)
        number, place = divmod(index, self.cache.shard_size)
        shard = self.shard(number)
        mirrored = self.flip and position is not None and is_flipped(self.seed, position)
        errors = shard.skipped.get(index, "")
        item = {
            "moments": shard.moments[place, int(mirrored)],  # (M, h, w)
            "index": (index + len(errors.splitlines())) % len(self),  # the image that replaces skipped files
            "position": index if position is None else position,
        }
        return {**item, "skipped": errors} if self.skips else item

    def shard(self, number: int) -> Shard:
        """Shard `number`. Raises `LoadError` (see `LatentCache.open`), or `UserError` if it skipped a file and may not.

        Another run, with `data.on_error=skip`, may have encoded the shard.
        """
        if number not in self._shards:
            shard = self.cache.open(number)
            if shard.skipped and not self.skips:
                error = next(iter(shard.skipped.values())).splitlines()[0]
                raise UserError(f"{error}; data.on_error=skip passes over such files")
            self._shards[number] = shard
        return self._shards[number]

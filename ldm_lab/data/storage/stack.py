"""Reads images from one array (N, H, W[, C]) in a `.npy` or `.npz` file, by memory map."""

from __future__ import annotations

import functools
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from ldm_lab.data.storage.files import Files, Place
from ldm_lab.utils.errors import UserError
from ldm_lab.utils.reading import LoadError, reason

MARKED = 64  # values of an image that its identity holds


@dataclass(frozen=True)
class Stack(Files):
    """The images of one array, each of which counts as a `.npy` file. Place: its index.

    Attributes:
        member: name of the array in an `.npz`; "" for a `.npy`.
        changed: time of the file's last change, in nanoseconds.
    """

    member: str
    changed: int

    @property
    def array(self) -> np.ndarray:
        """All images, `(N, H, W)` or `(N, H, W, C)`, memory-mapped once for each process."""
        return _mapped_once(self.root, self.member, self.changed)

    def members(self) -> Iterator[tuple[str, Place]]:
        """`000000000.npy` and so on."""
        return ((f"{index:09d}.npy", (index,)) for index in range(len(self.array)))

    def read(self, name: str, place: Place) -> bytes:
        """One image as a `.npy` file."""
        content = BytesIO()
        np.lib.format.write_array(content, np.ascontiguousarray(self.array[place[0]]), allow_pickle=False)
        return content.getvalue()

    def size(self, name: str, place: Place) -> int:
        """Bytes of the image."""
        return self.array[place[0]].nbytes

    def modified(self, name: str, place: Place) -> int:
        """Time of the file's last change."""
        return self.changed

    def identity(self, name: str, place: Place) -> bytes:
        """Size and name, and as all sizes are equal, values spread over the image."""
        values = self.array[place[0]].reshape(-1)
        return super().identity(name, place) + values[:: max(1, values.size // MARKED)].tobytes()


def open_stack(path: Path) -> Stack:
    """The images of a `.npy` or `.npz` file. Raises `UserError` unless it holds one array of images."""
    try:
        member = "" if path.suffix == ".npy" else _image_member(path)
        stack = Stack(path, member, path.stat().st_mtime_ns)
        array = stack.array
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        what = str(error) if isinstance(error, UserError) else f"cannot be read: {reason(path, error)}"
        raise UserError(f"data.root={path}: {what}") from error
    if array.ndim not in (3, 4) or not array.size or array.dtype.kind not in "buif":
        found = f"{array.dtype.name} of shape {array.shape}"
        raise UserError(f"data.root={path}: holds {found}; expected numbers of shape (N, H, W) or (N, H, W, C)")
    return stack


def _image_member(path: Path) -> str:
    """Name of the only array of an `.npz` that may hold images: of three or four axes."""
    with zipfile.ZipFile(path) as archive:
        found = [name[: -len(".npy")] for name in archive.namelist() if name.endswith(".npy")]
    several = [name for name in found if open_array(path, name, whole=False).ndim in (3, 4)]
    if len(several) != 1:
        which = f"{len(several)} arrays of three or four axes{': ' if several else ''}{', '.join(several)}"
        raise UserError(f"holds {which}; save the array of images alone with np.save, as a .npy file")
    return several[0]


def open_array(path: Path, name: str, whole: bool = True) -> np.ndarray:
    """An array of an `.npz`; memory-mapped if uncompressed, so that 50,000 images need not fit in memory.

    Args:
        path: the file.
        name: name of the array.
        whole: read a compressed array into memory, instead of raising an error.

    Raises:
        LoadError: the array is missing or compressed, or could execute code.
    """
    try:
        with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
            entry = archive.getinfo(f"{name}.npy")
            if entry.compress_type == zipfile.ZIP_STORED:
                file.seek(entry.header_offset + 26)
                file.seek(sum(struct.unpack("<HH", file.read(4))), 1)  # skip the entry's name and extra field
                return _mapped(path, file)
        if not whole:
            raise UserError(f"{name} is compressed: save it with np.save or np.savez, so that it can be mapped")
        with np.load(path, allow_pickle=False) as arrays:
            return arrays[name]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, struct.error) as error:
        there = "" if not isinstance(error, KeyError) else f"it has no {name}: "
        raise LoadError(f"{path}: not usable as .npz: {there}{reason(path, error)}") from error


def _mapped(path: Path, file: Any) -> np.ndarray:  # noqa: ANN401
    """Memory-map the array whose header begins at the current position of `file`."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if dtype.hasobject:
        raise UserError("it holds objects, which could run code")
    if not np.prod(shape):
        return np.empty(shape, dtype)
    return np.memmap(path, dtype, "r", file.tell(), shape, "F" if fortran else "C")


@functools.lru_cache(maxsize=2)
def _mapped_once(path: Path, member: str, changed: int) -> np.ndarray:
    if member:
        return open_array(path, member, whole=False)
    with open(path, "rb") as file:
        return _mapped(path, file)

"""Images as evaluation sees them: 8 bits, of one size, in a fixed order, with a fingerprint."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Sequence
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ldm_lab.data.dataset import ImageDataset, digest, spread
from ldm_lab.data.decode import EXTENSIONS
from ldm_lab.data.files import Found
from ldm_lab.data.images import FolderImages
from ldm_lab.utils.errors import UserError
from ldm_lab.utils.reading import LoadError, reason

PEEKED = 32  # files that are opened to see how they were compressed
RESIZE = "bicubic with antialiasing (Pillow)"  # of `ldm_lab.data.transforms`


class Pixels(Dataset):
    """`pixels[i]` is image i: `(3, H, W)`, uint8.

    Attributes:
        source: what the user calls it.
    """

    source: str

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> Tensor:
        raise NotImplementedError

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of all images."""
        return tuple(self[0].shape[1:])

    def fingerprint(self) -> str:
        """A short text that changes with the images."""
        raise NotImplementedError

    def jpeg(self) -> float | None:
        """The share that was compressed as JPEG; None where nobody knows."""
        return None

    def transform(self) -> dict[str, Any]:
        """How the images came to their size, as plain data; equal for equal pixels of equal files."""
        return {"image_size": list(self.size), "crop": "none", "resize": "none"}


class DataPixels(Pixels):
    """Images of a data set exactly as the loader gives them, none mirrored: resized, then cropped in the middle.

    Args:
        data: the data set.
        source: what the user calls it.
        most: so many at most, spread evenly; None takes all.
    """

    def __init__(self, data: ImageDataset, source: str, most: int | None = None) -> None:
        self.data, self.source = data, source
        self.count = min(len(data), most or len(data))

    def __len__(self) -> int:
        return self.count

    def index(self, place: int) -> int:
        """Which image of the data set stands at `place`."""
        return place * len(self.data) // self.count

    def __getitem__(self, place: int) -> Tensor:
        if not 0 <= place < self.count:
            raise IndexError(f"image {place} of {self.count}")
        image = self.data[self.index(place)]["image"]  # (3, H, W) in [-1, 1], of 8 bits
        return ((image + 1) * 127.5).round().to(torch.uint8)

    @property
    def size(self) -> tuple[int, int]:
        """As the data set says."""
        return self.data.image_size

    def fingerprint(self) -> str:
        """That of the data set, and how many of it."""
        return digest([self.data.fingerprint(), self.count])

    def jpeg(self) -> float:
        """Of some files, evenly spread; drawings were never compressed."""
        if not isinstance(self.data, FolderImages):
            return 0.0
        found = [self.data.format(self.index(place)) for place in spread(min(PEEKED, len(self)), len(self))]
        return sum(kind in ("JPEG", "MPO") for kind in found) / len(found)

    def transform(self) -> dict[str, Any]:
        """That of the data set, and how it resizes."""
        return {**self.data.transform(), "resize": RESIZE}


class FilePixels(Pixels):
    """Samples: PNG files of one size, taken as they are.

    Args:
        paths: the files.
        source: what the user calls them.
        identity: stands for what they are: where they follow from a model and a seed, nobody need read them all.
    """

    def __init__(self, paths: Sequence[Path], source: str, identity: str) -> None:
        self.paths, self.source, self.identity = paths, source, identity

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        with Image.open(self.paths[index], formats=["PNG"]) as image:
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)  # (H, W, 3) -> (3, H, W)

    def jpeg(self) -> float:
        """None of them."""
        return 0.0

    def fingerprint(self) -> str:
        """Of their identity and number."""
        return digest([self.identity, len(self)])


class ArrayPixels(Pixels):
    """`arr_0` of an `.npz`, `(N, H, W, 3)` uint8: `samples.npz`, and the files of the ADM evaluator.

    Args:
        path: the file.
        most: the first so many; None takes all.

    Raises:
        LoadError: there is no such array.
    """

    def __init__(self, path: Path, most: int | None = None) -> None:
        self.path, self.source = path, str(path)
        array = open_array(path, "arr_0")
        if array.ndim != 4 or array.shape[-1] != 3 or array.dtype != np.uint8 or not len(array):
            raise LoadError(f"{path}: arr_0 is {array.dtype} of {array.shape}, not images (N, H, W, 3) of uint8")
        self.array = array[:most]

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(np.array(self.array[index])).permute(2, 0, 1)  # (H, W, 3) -> (3, H, W)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "array": len(self.array)}  # a mapping is of one process

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = {**state, "array": open_array(state["path"], "arr_0")[: state["array"]]}

    @cached_property
    def _fingerprint(self) -> str:
        found = blake2b(digest_size=8)
        for image in self.array:
            found.update(np.ascontiguousarray(image).data)
        return found.hexdigest()

    def fingerprint(self) -> str:
        """Of all pixels."""
        return self._fingerprint


class WholeFolder(FolderImages):
    """All images of a folder or archive, in the order of their names; none is held out.

    Args:
        root: the folder, or a zip or tar archive.
        image_size: pixels, one number or (height, width).
        max_pixels: of a picture; None leaves it to Pillow.

    Raises:
        UserError: the folder is missing or holds fewer than two images.
    """

    pixels_key = "--max-pixels "

    def __init__(self, root: str | Path, image_size: int | Sequence[int], max_pixels: int | None = None) -> None:
        super().__init__(root, "train", image_size, max_pixels=max_pixels)

    @cached_property
    def _found(self) -> Found:
        found = self.files.find(EXTENSIONS)
        if len(found.names) < 2:
            raise UserError(f"{self.files.root}: {len(found.names)} image(s) in it: two are the least")
        return found


def open_array(path: Path, name: str) -> np.ndarray:
    """An array of an `.npz`; mapped where it is not compressed, for 50,000 images need not lie in memory together.

    Raises:
        LoadError: it is not there, or could run code.
    """
    try:
        with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
            entry = archive.getinfo(f"{name}.npy")
            if entry.compress_type == zipfile.ZIP_STORED:
                file.seek(entry.header_offset + 26)
                file.seek(sum(struct.unpack("<HH", file.read(4))), 1)  # past the entry's name and extra field
                return _mapped(path, file)
        with np.load(path, allow_pickle=False) as arrays:
            return arrays[name]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, struct.error) as error:
        there = "" if not isinstance(error, KeyError) else f"it has no {name}: "
        raise LoadError(f"{path}: not usable as .npz: {there}{reason(path, error)}") from error


def _mapped(path: Path, file: Any) -> np.ndarray:  # noqa: ANN401
    """The array whose header begins where `file` stands."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if dtype.hasobject:
        raise UserError("it holds objects, which could run code")
    if not np.prod(shape):
        return np.empty(shape, dtype)
    return np.memmap(path, dtype, "r", file.tell(), shape, "F" if fortran else "C")

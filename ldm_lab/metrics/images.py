"""Image sets for evaluation: of one size and depth, in a fixed order, with a fingerprint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ldm_lab.data.dataset import ImageDataset, digest, spread
from ldm_lab.data.decoding.arrays import NPY_FILES
from ldm_lab.data.decoding.pictures import EXTENSIONS
from ldm_lab.data.images import FolderImages
from ldm_lab.data.storage.files import Found
from ldm_lab.data.storage.stack import open_array
from ldm_lab.utils.errors import UserError
from ldm_lab.utils.images import to_unit
from ldm_lab.utils.pixels import RGB_8_BIT, PixelFormat
from ldm_lab.utils.reading import LoadError

PEEKED = 32  # files to open for their compression
RESIZE = "bicubic with antialiasing (Pillow)"  # resizing of `ldm_lab.data.transforms`


def to_networks(images: Tensor) -> Tensor:
    """Images of `Pixels`, of either dtype -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images


def like(images: Tensor, dtype: torch.dtype) -> Tensor:
    """Images about in [-1, 1] as those of `Pixels`: rounded to uint8, as displayed, or clamped float32."""
    return (to_unit(images) * 255).round().to(dtype) if dtype == torch.uint8 else images.float().clamp(-1, 1)


class Pixels(Dataset):
    """Item i is image i: `(C, H, W)`, uint8 if images of 8 bits have one channel or three, else float32 in [-1, 1].

    Attributes:
        source: the user's name for the images.
        pixels: channels and range of the data that the images are of.
    """

    source: str
    pixels: PixelFormat = RGB_8_BIT

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
        """Fraction of JPEG-compressed images; None if unknown."""
        return None

    def transform(self) -> dict[str, Any]:
        """Resizing and cropping of the images, as plain data; equal for equal pixels of equal files."""
        return {"image_size": list(self.size), "crop": "none", "resize": "none"}


class DataPixels(Pixels):
    """Images of a data set exactly as the loader gives them without flips: resized, then centre-cropped.

    Args:
        data: the data set.
        source: the user's name for the images.
        most: maximum number of images, evenly spaced; None: all images.
        pixels: see `Pixels`; None: those of the data set.
    """

    def __init__(
        self, data: ImageDataset, source: str, most: int | None = None, pixels: PixelFormat | None = None
    ) -> None:
        self.data, self.source, self.pixels = data, source, pixels or data.pixels
        self.count = min(len(data), most or len(data))

    def __len__(self) -> int:
        return self.count

    def index(self, place: int) -> int:
        """Index in the data set of the image at `place`."""
        return place * len(self.data) // self.count

    def __getitem__(self, place: int) -> Tensor:
        if not 0 <= place < self.count:
            raise IndexError(f"image {place} of {self.count}")
        image = self.data[self.index(place)]["image"]  # (C, H, W) in [-1, 1]
        return ((image + 1) * 127.5).round().to(torch.uint8) if self.data.pixels.is_picture else image

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the data set."""
        return self.data.image_size

    def fingerprint(self) -> str:
        """Hash of the data set's fingerprint and the number of images."""
        return digest([self.data.fingerprint(), self.count])

    def jpeg(self) -> float:
        """Fraction of JPEG files among some files, evenly spaced; 0 for drawn images."""
        if not isinstance(self.data, FolderImages):
            return 0.0
        found = [self.data.format(self.index(place)) for place in spread(min(PEEKED, len(self)), len(self))]
        return sum(kind in ("JPEG", "MPO") for kind in found) / len(found)

    def transform(self) -> dict[str, Any]:
        """The data set's transform and its resizing."""
        return {**self.data.transform(), "resize": RESIZE}


class FilePixels(Pixels):
    """Samples: files of one size, without any transform.

    Args:
        paths: the files.
        source: the user's name for the images.
        identity: text that identifies the images, such as a hash of model and seed, to avoid reading them all.
        read: reads a file; its images are those of `Pixels`.
        pixels: see `Pixels`.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        source: str,
        identity: str,
        read: Callable[[Path], Tensor],
        pixels: PixelFormat = RGB_8_BIT,
    ) -> None:
        self.paths, self.source, self.identity = paths, source, identity
        self.read, self.pixels = read, pixels

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        return self.read(self.paths[index])

    def jpeg(self) -> float:
        """0, as samples are no JPEG files."""
        return 0.0

    def fingerprint(self) -> str:
        """Hash of identity and number."""
        return digest([self.identity, len(self)])


class ArrayPixels(Pixels):
    """`arr_0` of an `.npz`, `(N, H, W, 3)` uint8: `samples.npz`, and the files of the ADM evaluator.

    Args:
        path: the file.
        most: maximum number of images, the first ones; None: all images.

    Raises:
        LoadError: the file has no such array.
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
        return {**self.__dict__, "array": len(self.array)}  # memory maps belong to one process

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = {**state, "array": open_array(state["path"], "arr_0")[: state["array"]]}

    @cached_property
    def _fingerprint(self) -> str:
        found = blake2b(digest_size=8)
        for image in self.array:
            found.update(np.ascontiguousarray(image).data)
        return found.hexdigest()

    def fingerprint(self) -> str:
        """Hash of all pixels."""
        return self._fingerprint


class WholeFolder(FolderImages):
    """All images of a folder or archive, sorted by name, without a held-out split.

    Args:
        root: the folder, or a zip or tar archive; with `cache_dir` also in a store.
        image_size: pixels, one number or (height, width).
        max_pixels: maximum pixels of an image; None: Pillow's limit.
        **values: `channels`, `value_range` and `cache_dir` of `FolderImages`.

    Raises:
        UserError: the folder is missing or holds fewer than two images.
    """

    pixels_key = "--max-pixels "

    def __init__(
        self,
        root: str | Path,
        image_size: int | Sequence[int],
        max_pixels: int | None = None,
        **values: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(root, "train", image_size, max_pixels=max_pixels, **values)

    @cached_property
    def _found(self) -> Found:
        found = self.files.find(EXTENSIONS)
        if not len(found.names):
            found = self.files.find(NPY_FILES)
        if len(found.names) < 2:
            raise UserError(f"{self.files.root}: {len(found.names)} image(s) in it: two are the least")
        return found

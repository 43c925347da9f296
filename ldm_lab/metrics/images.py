"""Image sets for evaluation: 8 bits, of one size, in a fixed order, with a fingerprint."""

from __future__ import annotations

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
from ldm_lab.data.stack import open_array
from ldm_lab.utils.errors import UserError
from ldm_lab.utils.reading import LoadError

PEEKED = 32  # files to open for their compression
RESIZE = "bicubic with antialiasing (Pillow)"  # resizing of `ldm_lab.data.transforms`


class Pixels(Dataset):
    """`pixels[i]` is image i: `(3, H, W)`, uint8.

    Attributes:
        source: the user's name for the images.
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
    """

    def __init__(self, data: ImageDataset, source: str, most: int | None = None) -> None:
        self.data, self.source = data, source
        self.count = min(len(data), most or len(data))

    def __len__(self) -> int:
        return self.count

    def index(self, place: int) -> int:
        """Index in the data set of the image at `place`."""
        return place * len(self.data) // self.count

    def __getitem__(self, place: int) -> Tensor:
        if not 0 <= place < self.count:
            raise IndexError(f"image {place} of {self.count}")
        image = self.data[self.index(place)]["image"]  # (3, H, W) in [-1, 1], from 8 bits
        return ((image + 1) * 127.5).round().to(torch.uint8)

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
    """Samples: PNG files of one size, without any transform.

    Args:
        paths: the files.
        source: the user's name for the images.
        identity: text that identifies the images, such as a hash of model and seed, to avoid reading them all.
    """

    def __init__(self, paths: Sequence[Path], source: str, identity: str) -> None:
        self.paths, self.source, self.identity = paths, source, identity

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        with Image.open(self.paths[index], formats=["PNG"]) as image:
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)  # (H, W, 3) -> (3, H, W)

    def jpeg(self) -> float:
        """0, as samples are PNG files."""
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
        root: the folder, or a zip or tar archive.
        image_size: pixels, one number or (height, width).
        max_pixels: maximum pixels of an image; None: Pillow's limit.

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

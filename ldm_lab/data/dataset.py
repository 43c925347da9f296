"""Base class of all image data sets: items, crops and flips."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from ldm_lab.data.arrays import ArrayImage
from ldm_lab.data.transforms import center_crop, parse_size, random_crop, random_flip, resize_to_cover, to_tensor
from ldm_lab.utils.errors import UserError
from ldm_lab.utils.pixels import RGB_8_BIT

SPLITS = ("train", "val")


class ImageDataset(Dataset):
    """Images of one size; a subclass defines their number (`__len__`) and reads an image (`read`).

    `dataset[index, position]` is a training item, cropped and flipped as a function of (seed, position),
    where `position` is its place in the stream of training images (see `StreamBatchSampler`).
    `dataset[index]` is the same image with a centre crop and no flip. An item is a dictionary:

    - `image`: `(C, H, W)`, float32 in [-1, 1];
    - `index`: index of the image in this data set;
    - `position`: place in the stream, or `index` without a position.

    Args:
        split: "train" or "val".
        image_size: pixels, one number or (height, width).
        random_crop: use random crops for training, else centre crops.
        flip: mirror half of the training images.
        seed: seed of crops and flips.

    Attributes:
        pixels: channels C of the images, and the values of their data that become -1 and 1.
        by_shards: whether training reads archive after archive (see `ImageDataModule`).
        on_error: for an image that cannot be decoded: "raise", or "skip", which replaces it by another image.
    """

    pixels = RGB_8_BIT
    on_error = "raise"
    by_shards = False

    def __init__(
        self,
        split: str,
        image_size: int | Sequence[int],
        random_crop: bool = False,
        flip: bool = False,
        seed: int = 0,
    ) -> None:
        if split not in SPLITS:
            raise UserError(f"split={split!r} of {type(self).__name__}: use one of {SPLITS}")
        self.split = split
        self.image_size = parse_size(image_size)
        self.random_crop = random_crop
        self.flip = flip
        self.seed = seed

    def __len__(self) -> int:
        raise NotImplementedError

    def read(self, index: int) -> Image.Image | ArrayImage:
        """Image `index` of any size: 8-bit RGB or grey, or an array of C channels."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """A short text that is equal for equal images, whatever their crops."""
        raise NotImplementedError

    def marks(self) -> np.ndarray:
        """A hash for every image, sorted: `(N,)`, uint32. Equal for equal data.

        For images without names, the hash is of the data set's fingerprint and the image's index.
        """
        whole = self.fingerprint()
        return sorted_marks(f"{whole} {index}".encode() for index in range(len(self)))

    def transform(self) -> dict[str, Any]:
        """The settings of `dataset[index]` that change pixels, as plain data: equal for equal pixels."""
        return {"image_size": list(self.image_size), "crop": "center"}

    def passed_over(self) -> str:
        """A phrase on the files beside the images that are not images; "" without such files."""
        return ""

    def groups(self, window: int) -> np.ndarray | None:
        """Number of the archive that holds each image: `(N,)`; `None` unless the images lie in a set of archives.

        Raises `UserError` if the limit of copies has no room for the archives that are mixed, `window` of them.
        """
        return None

    def prepare(self) -> None:
        """Write the files that the data set needs. One process per machine calls this before any image is read."""

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        index, position = key if isinstance(key, tuple) else (key, None)
        image = resize_to_cover(self.read(index), self.image_size)
        if position is not None and self.random_crop:
            image = random_crop(image, self.image_size, self.seed, position)
        else:
            image = center_crop(image, self.image_size)
        if position is not None and self.flip:
            image = random_flip(image, self.seed, position)
        return {"image": to_tensor(image), "index": index, "position": index if position is None else position}


def sorted_marks(images: Iterable[bytes]) -> np.ndarray:
    """Hashes of the bytes that identify each image: `(N,)`, uint32, sorted."""
    hashes = b"".join(blake2b(image, digest_size=4).digest() for image in images)
    return np.sort(np.frombuffer(hashes, "<u4"))


def digest(parts: Iterable[object]) -> str:
    """Hash of `parts`: sixteen hexadecimal digits."""
    return blake2b("\n".join(map(str, parts)).encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()


def spread(count: int, size: int) -> list[int]:
    """`count` evenly spaced indices into a data set of `size` images; with repeats if `size` is smaller."""
    return [place * size // count for place in range(count)]

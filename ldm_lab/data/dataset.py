"""What all image data sets share: items, crops and flips."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from ldm_lab.data.transforms import center_crop, parse_size, random_crop, random_flip, resize_to_cover, to_tensor
from ldm_lab.utils.errors import UserError

SPLITS = ("train", "val")


class ImageDataset(Dataset):
    """Images of one size; a subclass says how many there are (`__len__`) and gives them (`read`).

    `dataset[index, position]` is an item for training, cropped and flipped as a function of
    (seed, position), where `position` is its place in the stream of training images (see
    `StreamBatchSampler`). `dataset[index]` is the same image cropped in the middle and not flipped.
    An item is a dictionary:

    - `image`: `(3, H, W)`, float32 in [-1, 1];
    - `index`: which image of this data set it is;
    - `position`: its place in the stream, or again `index`.

    Args:
        split: "train" or "val", which part of the images this is.
        image_size: pixels, one number or (height, width).
        random_crop: crop for training at random, else in the middle.
        flip: exchange left and right in half of the training images.
        seed: of crops and flips.

    Attributes:
        on_error: what becomes of an image that cannot be decoded: "raise", or "skip" where another takes its place.
    """

    on_error = "raise"

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

    def read(self, index: int) -> Image.Image:
        """Image `index` as 8-bit RGB of any size."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """A short text that changes with the images (not with their crops): equal for equal data."""
        raise NotImplementedError

    def marks(self) -> np.ndarray:
        """For every image a number that changes with it, sorted: `(N,)`, uint32. Equal for equal data.

        Where images have no names of their own, it is of the whole and the image's index.
        """
        whole = self.fingerprint()
        return sorted_marks(f"{whole} {index}".encode() for index in range(len(self)))

    def transform(self) -> dict[str, Any]:
        """What `dataset[index]` makes of image `index`, as plain data: equal for equal pixels."""
        return {"image_size": list(self.image_size), "crop": "center"}

    def passed_over(self) -> str:
        """Which files lie beside the images and are none, in words; "" for none."""
        return ""

    def prepare(self) -> None:
        """Make what must lie on disk. Called by one process per machine before any image is read."""

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
    """The hashes of what stands for each image: `(N,)`, uint32, sorted."""
    hashes = b"".join(blake2b(image, digest_size=4).digest() for image in images)
    return np.sort(np.frombuffer(hashes, "<u4"))


def digest(parts: Iterable[object]) -> str:
    """Sixteen hexadecimal digits that stand for `parts`."""
    return blake2b("\n".join(map(str, parts)).encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()


def spread(count: int, size: int) -> list[int]:
    """`count` indices, evenly over a data set of `size` images; with repeats where it has fewer."""
    return [place * size // count for place in range(count)]

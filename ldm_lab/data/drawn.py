"""Tiny images drawn on access, for `debug=tiny` and tests: no download, no files."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from ldm_lab.data.dataset import ImageDataset, digest
from ldm_lab.data.images import FolderImages, MaxPixels, OnError
from ldm_lab.utils.limits import Count, Whole


class DrawnImages(ImageDataset):
    """Coloured discs, squares and triangles on a plain background; image i is a function of (drawing_seed, i).

    The first `num_train` images are for training, the next `num_val` are held out.

    Args:
        split: "train" or "val".
        image_size: pixels, one number or (height, width).
        num_train: number of training images.
        num_val: number of held-out images.
        drawing_seed: seed of the images.
        flip: mirror half of the training images.
        seed: seed of the flips.
    """

    def __init__(
        self,
        split: str,
        image_size: int | Sequence[int],
        num_train: Count = 64,
        num_val: Count = 16,
        drawing_seed: Whole = 0,
        flip: bool = False,
        seed: Whole = 0,
    ) -> None:
        super().__init__(split, image_size, flip=flip, seed=seed)
        self.first, self.count = (0, num_train) if split == "train" else (num_train, num_val)
        self.drawing_seed = drawing_seed

    def __len__(self) -> int:
        return self.count

    def read(self, index: int) -> Image.Image:
        """Image `index` of the split."""
        if not 0 <= index < self.count:
            raise IndexError(f"image {index} of {self.count}")
        numbers = random.Random(f"drawn/{self.drawing_seed}/{self.first + index}")
        height, width = self.image_size
        image = Image.new("RGB", (width, height), _color(numbers))
        canvas = ImageDraw.Draw(image)
        for _ in range(3):
            radius = (0.1 + 0.3 * numbers.random()) * min(height, width)
            center = numbers.random() * width, numbers.random() * height
            _draw_shape(canvas, numbers, center, radius)
        return image

    def fingerprint(self) -> str:
        """The seed, the split and the size."""
        return digest(["drawn", self.drawing_seed, self.first, self.count, self.image_size])


def drawn_or_folder(
    root: str | Path | None,
    split: str,
    image_size: int | Sequence[int],
    on_error: OnError = "raise",
    max_pixels: MaxPixels = None,
    **options: Any,  # noqa: ANN401
) -> ImageDataset:
    """`FolderImages(root, ..., **options)`, or drawn images where `root` is None: what `debug=tiny` trains on."""
    if root is None:
        return DrawnImages(split, image_size)
    return FolderImages(root, split, image_size, on_error=on_error, max_pixels=max_pixels, **options)


def _color(numbers: random.Random) -> tuple[int, int, int]:
    red, green, blue = (int(256 * numbers.random()) for _ in range(3))
    return red, green, blue


def _draw_shape(
    canvas: ImageDraw.ImageDraw, numbers: random.Random, center: tuple[float, float], radius: float
) -> None:
    color, corners = _color(numbers), (0, 3, 4)[int(3 * numbers.random())]
    if corners:
        canvas.regular_polygon((*center, radius), corners, rotation=int(360 * numbers.random()), fill=color)
    else:
        canvas.circle(center, radius, fill=color)

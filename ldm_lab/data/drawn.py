"""Tiny images drawn on access, for `debug=tiny` and tests: no download, no files."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ldm_lab.data.arrays import ArrayImage, Samples, to_image
from ldm_lab.data.dataset import ImageDataset, digest
from ldm_lab.data.images import FolderImages, MaxPixels, OnError
from ldm_lab.data.value_range import ValueRange, parse_range
from ldm_lab.utils.limits import Count, Whole
from ldm_lab.utils.pixels import RGB_8_BIT, PixelFormat


class DrawnImages(ImageDataset):
    """Coloured discs, squares and triangles on a plain background; image i is a function of (drawing_seed, i).

    With other `channels` or a `value_range` they are fields of soft discs, of that many channels (see `draw_field`).
    The first `num_train` images are for training, the next `num_val` are held out.

    Args:
        split: "train" or "val".
        image_size: pixels, one number or (height, width).
        num_train: number of training images.
        num_val: number of held-out images.
        drawing_seed: seed of the images.
        flip: mirror half of the training images.
        seed: seed of the flips.
        channels: number of channels.
        value_range: (low, high), range of the fields; None and "measure": 0 to 255.
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
        channels: Count = 3,
        value_range: ValueRange = None,
    ) -> None:
        super().__init__(split, image_size, flip=flip, seed=seed)
        known = parse_range(value_range, channels)
        self.pixels = PixelFormat(channels, known if isinstance(known, tuple) else RGB_8_BIT.value_range)
        self.first, self.count = (0, num_train) if split == "train" else (num_train, num_val)
        self.drawing_seed = drawing_seed

    def __len__(self) -> int:
        return self.count

    def read(self, index: int) -> Image.Image | ArrayImage:
        """Image `index` of the split."""
        if not 0 <= index < self.count:
            raise IndexError(f"image {index} of {self.count}")
        numbers = random.Random(f"drawn/{self.drawing_seed}/{self.first + index}")
        height, width = self.image_size
        if self.pixels != RGB_8_BIT:
            field = draw_field(numbers, self.pixels, height, width)
            return to_image(Samples(field, colours=False), self.pixels, background=(0, 0, 0))
        image = Image.new("RGB", (width, height), _color(numbers))
        canvas = ImageDraw.Draw(image)
        for _ in range(3):
            radius = (0.1 + 0.3 * numbers.random()) * min(height, width)
            center = numbers.random() * width, numbers.random() * height
            _draw_shape(canvas, numbers, center, radius)
        return image

    def fingerprint(self) -> str:
        """The seed, the split, the size, and a format other than 8-bit RGB."""
        other = [] if self.pixels == RGB_8_BIT else [repr(self.pixels)]
        return digest(["drawn", self.drawing_seed, self.first, self.count, self.image_size, *other])


def drawn_or_folder(
    root: str | Path | None,
    split: str,
    image_size: int | Sequence[int],
    on_error: OnError = "raise",
    max_pixels: MaxPixels = None,
    channels: Count = 3,
    value_range: ValueRange = None,
    **options: Any,  # noqa: ANN401
) -> ImageDataset:
    """`FolderImages(root, ..., **options)`, or drawn images where `root` is None: what `debug=tiny` trains on."""
    if root is None:
        return DrawnImages(split, image_size, channels=channels, value_range=value_range)
    options = {"on_error": on_error, "max_pixels": max_pixels, "value_range": value_range, **options}
    return FolderImages(root, split, image_size, channels=channels, **options)


def draw_field(numbers: random.Random, pixels: PixelFormat, height: int, width: int) -> np.ndarray:
    """Soft discs on a dark ground, like cells under a microscope: `(H, W, C)`, float64 in the range of `pixels`.

    Each disc has its own brightness in every channel.
    """
    y, x = np.mgrid[:height, :width]
    field = np.zeros((height, width, pixels.channels))
    for _ in range(6):
        top, left, radius = (numbers.random() for _ in range(3))
        radius = (0.08 + 0.12 * radius) * min(height, width)
        disc = np.exp(-((y - top * height) ** 2 + (x - left * width) ** 2) / (2 * radius**2))
        brightness = [numbers.random() for _ in range(pixels.channels)]
        field = np.maximum(field, disc[..., None] * brightness)
    low, high = pixels.value_range
    return (low + field * (high - low)).clip(low, high)


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

"""From a decoded picture to the tensor that a network sees: pure functions on PIL images.

What is random is a function of (seed, position), the position being the image's place in the global
stream of training images: a resumed run crops and flips alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor

from ldm_lab.utils.errors import UserError
from ldm_lab.utils.randomness import generator

RGB = tuple[int, int, int]
Size = tuple[int, int]  # (height, width) in pixels
MOST_PIXELS = 2**27  # of a picture after scaling: 400 MB
UPRIGHT = {  # what a viewer does for an EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def parse_size(image_size: int | Sequence[int]) -> Size:
    """`data.image_size` as (height, width). Raises `UserError` unless it is one or two positive whole numbers."""
    sides = [image_size] * 2 if isinstance(image_size, Integral) else image_size
    if isinstance(sides, str) or not isinstance(sides, Sequence) or len(sides) != 2 or not all(map(_positive, sides)):
        raise UserError(f"data.image_size={image_size}: give a positive whole number of pixels or [height, width]")
    return int(sides[0]), int(sides[1])


def _positive(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and value > 0


def to_rgb(image: Image.Image, background: RGB) -> Image.Image:
    """Upright 8-bit RGB: EXIF rotation applied, transparency of any kind laid over `background`.

    EXIF data that cannot be read turn nothing. Sixteen bits span the same range as eight. Colour profiles are not
    applied.

    Raises:
        UserError: the picture is grey in floats, or in integers of 32 bits or with a sign. Which of
            their values is white is nowhere said, and scaling each by its own would make them unequal.
    """
    image.load()
    if (turn := _turn(image)) is not None:
        image = image.transpose(turn)
    if image.mode in ("F", "I"):
        raise UserError("floats or 32-bit integers, of which none is known to be white; save it with 8 or 16 bits")
    if image.mode.startswith("I;16"):  # Pillow's own conversion would clip it at 255
        levels = np.asarray(image).astype(np.int64)
        image = Image.fromarray(((levels + 128) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, background), image).convert("RGB")
    return image.convert("RGB")


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What makes an image upright; None where it is, or its EXIF data are damaged."""
    try:
        return UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # their reader raises almost anything
        return None


def covering_size(image: Image.Image, size: Size) -> tuple[int, int]:
    """(width, height) to which an image is scaled so that it just covers `size`.

    Raises:
        UserError: that would be a picture of `MOST_PIXELS` or more, made of one that is far too narrow.
    """
    height, width = size
    scale = max(height / image.height, width / image.width)
    covering = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    if covering[0] * covering[1] >= MOST_PIXELS:
        raise UserError(f"{image.width}x{image.height} pixels are too narrow to be enlarged to {width}x{height}")
    return covering


def resize_to_cover(image: Image.Image, size: Size) -> Image.Image:
    """Scale, keeping the proportions, to the smallest picture that a crop of `size` fits into.

    For a square crop the shorter side becomes its side. Bicubic with antialiasing (Pillow widens the
    kernel when it shrinks), as for the reference statistics that FIDs are compared with.
    """
    covering = covering_size(image, size)
    return image if covering == image.size else image.resize(covering, Image.Resampling.BICUBIC)


def center_crop(image: Image.Image, size: Size) -> Image.Image:
    """The middle `size` of an image that covers it."""
    return _crop(image, size, (image.height - size[0]) // 2, (image.width - size[1]) // 2)


def random_crop(image: Image.Image, size: Size, seed: int, position: int) -> Image.Image:
    """A `size` of an image that covers it, every placement equally likely: a function of (seed, position)."""
    u, v = torch.rand(2, generator=generator(seed, "crop", position), dtype=torch.float64).tolist()
    return _crop(image, size, int(u * (image.height - size[0] + 1)), int(v * (image.width - size[1] + 1)))


def random_flip(image: Image.Image, seed: int, position: int) -> Image.Image:
    """Left and right exchanged where `is_flipped` says so."""
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if is_flipped(seed, position) else image


def is_flipped(seed: int, position: int) -> bool:
    """True for half of the positions: a function of (seed, position)."""
    return torch.rand((), generator=generator(seed, "flip", position)).item() < 0.5


def to_tensor(image: Image.Image) -> Tensor:
    """RGB image -> `(3, H, W)`, float32 in [-1, 1]."""
    pixels = torch.from_numpy(np.array(image))  # (H, W, 3), uint8
    return pixels.permute(2, 0, 1).contiguous().float() / 127.5 - 1  # (H, W, 3) -> (3, H, W)


def _crop(image: Image.Image, size: Size, top: int, left: int) -> Image.Image:
    height, width = size
    return image.crop((left, top, left + width, top + height))

"""Image transforms, from a PIL image to the network's input tensor, as pure functions.

Random crops and flips are functions of (seed, position), where position is the image's place in the
global stream of training images: a resumed run crops and flips the same way.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor

from ldm_lab.data.arrays import RGB, ArrayImage
from ldm_lab.utils.arguments import is_integer
from ldm_lab.utils.errors import UserError
from ldm_lab.utils.randomness import generator

Size = tuple[int, int]  # (height, width) in pixels
MOST_PIXELS = 2**27  # limit of an image after scaling: 400 MB
UPRIGHT = {  # EXIF orientation -> the transpose that makes the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def parse_size(image_size: int | Sequence[int]) -> Size:
    """`data.image_size` as (height, width). Raises `UserError` unless it is one or two positive integers."""
    sides = [image_size] * 2 if is_integer(image_size) else image_size
    pair = isinstance(sides, Sequence) and not isinstance(sides, str) and len(sides) == 2
    if not pair or not all(is_integer(side) and side > 0 for side in sides):
        raise UserError(f"data.image_size={image_size}: give a positive whole number of pixels or [height, width]")
    return int(sides[0]), int(sides[1])


def to_rgb(image: Image.Image, background: RGB, mode: str = "RGB") -> Image.Image:
    """Convert to upright 8-bit RGB: applies the EXIF rotation, and composites any transparency over `background`.

    With mode "L" the result is the luma (ITU-R BT.601) of this RGB image. Unreadable EXIF data are ignored. 16-bit
    images are scaled to the 8-bit range. Colour profiles are not applied.

    Raises:
        UserError: the image is greyscale in float, 32-bit or signed integers. These formats define no
            white value, and scaling each image by its own maximum would make images inconsistent.
    """
    image.load()
    if (turn := turn_of(image)) is not None:
        image = image.transpose(turn)
    if image.mode in ("F", "I"):
        kind = "floats or 32-bit integers, of which none is known to be white"
        raise UserError(f"{kind}: give data.value_range=, or save it with 8 or 16 bits")
    if image.mode.startswith("I;16"):  # Pillow's own conversion clips at 255
        image = Image.fromarray(to_8_bit(np.asarray(image)))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    elif mode == "L" and image.mode in ("1", "L"):
        return image.convert("L")
    image = image.convert("RGB")
    return image if mode == "RGB" else image.convert(mode)


def to_8_bit(levels: np.ndarray) -> np.ndarray:
    """16-bit levels, any shape -> uint8, rounded to the nearest: 0..65535 becomes 0..255."""
    return ((levels.astype(np.int64) + 128) // 257).astype(np.uint8)


def turn_of(image: Image.Image) -> Image.Transpose | None:
    """The transpose that makes an image upright; None if it is upright, or its EXIF data are unreadable."""
    try:
        return UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # the EXIF reader raises almost anything
        return None


def covering_size(image: Image.Image, size: Size) -> tuple[int, int]:
    """(width, height) of the smallest scaled image that covers `size`.

    Raises:
        UserError: the scaled image would have `MOST_PIXELS` or more, as the image is far too narrow.
    """
    height, width = size
    scale = max(height / image.height, width / image.width)
    covering = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    if covering[0] * covering[1] >= MOST_PIXELS:
        raise UserError(f"{image.width}x{image.height} pixels are too narrow to be enlarged to {width}x{height}")
    return covering


def resize_to_cover(image: Image.Image, size: Size) -> Image.Image:
    """Scale an image to the smallest size that covers a crop of `size`; keeps the aspect ratio.

    For a square crop the shorter side becomes the crop's side. Bicubic with antialiasing (Pillow widens
    the kernel when it shrinks), as for the reference statistics of published FIDs.
    """
    covering = covering_size(image, size)
    return image if covering == image.size else image.resize(covering, Image.Resampling.BICUBIC)


def center_crop(image: Image.Image, size: Size) -> Image.Image:
    """Centre crop of `size`, from an image that covers it."""
    return _crop(image, size, (image.height - size[0]) // 2, (image.width - size[1]) // 2)


def random_crop(image: Image.Image, size: Size, seed: int, position: int) -> Image.Image:
    """Uniformly random crop of `size`, from an image that covers it: a function of (seed, position)."""
    u, v = torch.rand(2, generator=generator(seed, "crop", position), dtype=torch.float64).tolist()
    return _crop(image, size, int(u * (image.height - size[0] + 1)), int(v * (image.width - size[1] + 1)))


def random_flip(image: Image.Image, seed: int, position: int) -> Image.Image:
    """Mirror the image if `is_flipped(seed, position)`."""
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if is_flipped(seed, position) else image


def is_flipped(seed: int, position: int) -> bool:
    """True for half of the positions: a function of (seed, position)."""
    return torch.rand((), generator=generator(seed, "flip", position)).item() < 0.5


def to_tensor(image: Image.Image | ArrayImage) -> Tensor:
    """RGB image, grey image or array -> `(C, H, W)`, float32 in [-1, 1]."""
    if isinstance(image, ArrayImage):
        return image.to_tensor()
    pixels = torch.from_numpy(np.array(image)).view(image.height, image.width, -1)  # (H, W, C), uint8
    return pixels.permute(2, 0, 1).contiguous().float() / 127.5 - 1  # (H, W, C) -> (C, H, W)


def _crop(image: Image.Image, size: Size, top: int, left: int) -> Image.Image:
    height, width = size
    return image.crop((left, top, left + width, top + height))

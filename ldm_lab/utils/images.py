"""Converts image tensors to uint8 arrays, PIL images and PNG grids."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ldm_lab.utils.arguments import is_integer
from ldm_lab.utils.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

# RGB -> luma and the two colour differences Cb and Cr: ITU-R BT.601-7 (2011), section 2.5.
LUMA_CHROMA = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))


def to_unit(images: Tensor) -> Tensor:
    """[-1, 1] -> [0, 1], clamped, any shape."""
    return (images / 2 + 0.5).clamp(0, 1)


def to_numpy(images: Tensor) -> np.ndarray:
    """`(B, C, H, W)` in [0, 1] -> `(B, H, W, C)` float32."""
    return images.permute(0, 2, 3, 1).float().cpu().numpy()


def as_rgb(images: Tensor, channels: Sequence[int] | None = None) -> Tensor:
    """`(..., C, H, W)` -> `(..., 3, H, W)` of the same range, for pictures; a single channel is shown as grey.

    Args:
        images: images of any number of channels.
        channels: indices of the one channel or the three that are shown; None: the first three, or the first.
    """
    count = images.shape[-3]
    if channels is None:
        channels = range(3) if count >= 3 else (0,)
    if list(channels) == list(range(count)) == [0, 1, 2]:
        return images
    chosen = images[..., list(channels), :, :]
    return chosen.expand(*chosen.shape[:-3], 3, -1, -1)


def require_shown(channels: Sequence[int] | None, count: int, key: str) -> None:
    """Raise `UserError` unless `channels` are one or three channels of images of `count` channels, or None."""
    if channels is None:
        return
    known = isinstance(channels, Sequence) and all(is_integer(one) and 0 <= one < count for one in channels)
    if not known or len(channels) not in (1, 3):
        raise UserError(f"{key}={channels}: give one channel, or three to show as RGB, of 0 to {count - 1}")


def to_uint8(images: Tensor) -> np.ndarray:
    """`(B, C, H, W)` in [0, 1] -> `(B, H, W, C)` in 0..255, rounded to the nearest."""
    return (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def tile(image: Tensor, channels: Sequence[int] | None = None) -> np.ndarray:
    """`(C, H, W)`, uint8 or floats in [-1, 1] -> `(H, W, 3)`, uint8; for `channels` see `as_rgb`."""
    image = as_rgb(image, channels)
    if image.dtype != torch.uint8:
        return to_uint8(to_unit(image)[None])[0]
    return image.permute(1, 2, 0).cpu().numpy()  # (3, H, W) -> (H, W, 3)


def to_pil(images: Tensor) -> list[Image.Image]:
    """`(B, 3, H, W)` or `(B, 1, H, W)` in [0, 1] -> B images, RGB or grey."""
    from PIL import Image

    return [Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image) for image in to_uint8(images)]


def require_pil(channels: int) -> None:
    """Raise `UserError` for images of so many channels that Pillow has none."""
    if channels not in (1, 3):
        raise UserError(f"output_type='pil': Pillow has no images of {channels} channels; give 'np' or 'pt'")


def array_to_pil(images: np.ndarray) -> list[Image.Image]:
    """`(B, H, W, C)` or `(H, W, C)` in [0, 1] -> B images; one channel gives greyscale."""
    import numpy as np
    from PIL import Image

    pixels = (images[None] if images.ndim == 3 else images) * 255
    pixels = pixels.round().astype(np.uint8)
    return [Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image) for image in pixels]


def grid(tiles: Sequence[np.ndarray], columns: int | None = None, gap: int = 2) -> Image.Image:
    """Grid of images `(H, W, 3)` uint8 of equal size, row by row, on white; nearly square by default."""
    from PIL import Image

    height, width, _ = tiles[0].shape
    columns = columns or math.ceil(math.sqrt(len(tiles)))
    rows = math.ceil(len(tiles) / columns)
    picture = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), "white")
    for index, tile in enumerate(tiles):
        row, column = divmod(index, columns)
        picture.paste(Image.fromarray(tile), (gap + column * (width + gap), gap + row * (height + gap)))
    return picture


def save_png(image: Image.Image, path: Path) -> None:
    """Write a PNG atomically."""
    from ldm_lab.utils.writing import replacing

    with replacing(path) as temporary:
        image.save(temporary, format="PNG")


def save_sheet(images: Tensor, path: Path, columns: int | None = None, channels: Sequence[int] | None = None) -> None:
    """Write `(B, C, H, W)` images in [-1, 1] as one PNG; replaces an earlier file. For `channels` see `as_rgb`."""
    save_png(sheet(images, columns, channels), path)


def sheet(images: Tensor, columns: int | None = None, channels: Sequence[int] | None = None) -> Image.Image:
    """Grid of `(B, C, H, W)` images in [-1, 1]; for `channels` see `as_rgb`."""
    return grid(to_uint8(to_unit(as_rgb(images, channels))), columns)


def save_pngs(images: Mapping[Path, Image.Image]) -> None:
    """Write PNGs atomically, on all cores, as compressing a batch takes longer than sampling it on a GPU."""
    with ThreadPoolExecutor() as threads:
        list(threads.map(save_png, images.values(), images))

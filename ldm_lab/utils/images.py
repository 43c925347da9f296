"""Converts image tensors in [-1, 1] to uint8 arrays, PIL images and PNG grids."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

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


def to_uint8(images: Tensor) -> np.ndarray:
    """`(B, 3, H, W)` in [0, 1] -> `(B, H, W, 3)` in 0..255, rounded to the nearest."""
    return (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def to_pil(images: Tensor) -> list[Image.Image]:
    """`(B, 3, H, W)` in [0, 1] -> B images."""
    from PIL import Image

    return [Image.fromarray(image) for image in to_uint8(images)]


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
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), "white")
    for index, tile in enumerate(tiles):
        row, column = divmod(index, columns)
        sheet.paste(Image.fromarray(tile), (gap + column * (width + gap), gap + row * (height + gap)))
    return sheet


def save_png(image: Image.Image, path: Path) -> None:
    """Write a PNG atomically."""
    from ldm_lab.utils.writing import replacing

    with replacing(path) as temporary:
        image.save(temporary, format="PNG")


def save_sheet(images: Tensor, path: Path, columns: int | None = None) -> None:
    """Write `(B, 3, H, W)` images in [-1, 1] as one PNG; replaces an earlier file."""
    save_png(grid(to_uint8(to_unit(images)), columns), path)


def save_pngs(images: Mapping[Path, Image.Image]) -> None:
    """Write PNGs atomically, on all cores, as compressing a batch takes longer than sampling it on a GPU."""
    with ThreadPoolExecutor() as threads:
        list(threads.map(save_png, images.values(), images))

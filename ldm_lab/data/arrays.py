"""Images as arrays of any number of channels and any depth: channels, range, resizing and cropping, in float32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ldm_lab.utils.errors import UserError
from ldm_lab.utils.images import LUMA_CHROMA
from ldm_lab.utils.pixels import PixelFormat

RGB = tuple[int, int, int]
FULL = {np.dtype(np.uint8): (0.0, 255.0), np.dtype(np.uint16): (0.0, 65535.0)}  # range of integers without a given one
ROUNDING = 1e-9  # part of the range: lumas that were measured on another machine may differ in their last digit
TURNS = {  # Pillow's transposes of an array (H, W, ...)
    Image.Transpose.FLIP_LEFT_RIGHT: lambda array: array[:, ::-1],
    Image.Transpose.FLIP_TOP_BOTTOM: lambda array: array[::-1],
    Image.Transpose.ROTATE_90: lambda array: np.rot90(array),
    Image.Transpose.ROTATE_180: lambda array: np.rot90(array, 2),
    Image.Transpose.ROTATE_270: lambda array: np.rot90(array, 3),
    Image.Transpose.TRANSPOSE: lambda array: array.swapaxes(0, 1),
    Image.Transpose.TRANSVERSE: lambda array: np.rot90(array, 2).swapaxes(0, 1),
}


class MismatchError(UserError):
    """The content of a file does not fit `data.channels` or `data.value_range`."""


class Samples(NamedTuple):
    """The content of a file, as stored.

    Attributes:
        array: `(H, W, S)`, any real dtype.
        colours: whether the samples are grey or RGB, with alpha last if S is 2 or 4; else they are plain channels.
    """

    array: np.ndarray
    colours: bool


@dataclass(frozen=True)
class ArrayImage:
    """An image with the methods of `PIL.Image.Image` that `transforms` calls.

    Attributes:
        values: `(C, H, W)`, float32; the range of the data is [-1, 1].
    """

    values: Tensor

    @property
    def height(self) -> int:
        """Height in pixels."""
        return self.values.shape[1]

    @property
    def width(self) -> int:
        """Width in pixels."""
        return self.values.shape[2]

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.width, self.height

    def resize(self, size: tuple[int, int], resample: Image.Resampling) -> ArrayImage:
        """Scale to (width, height), bicubic with antialiasing as Pillow, but without rounding to 8 bits."""
        if resample != Image.Resampling.BICUBIC:
            raise ValueError(f"{resample!r} of arrays is not written")
        options = {"size": size[::-1], "mode": "bicubic", "antialias": True, "align_corners": False}
        return ArrayImage(F.interpolate(self.values[None], **options)[0])

    def crop(self, box: tuple[int, int, int, int]) -> ArrayImage:
        """The part (left, top, right, bottom)."""
        left, top, right, bottom = box
        return ArrayImage(self.values[:, top:bottom, left:right])

    def transpose(self, method: Image.Transpose) -> ArrayImage:
        """Exchange left and right."""
        if method != Image.Transpose.FLIP_LEFT_RIGHT:
            raise ValueError(f"{method!r} of arrays is not written")
        return ArrayImage(self.values.flip(-1))

    def to_tensor(self) -> Tensor:
        """`(C, H, W)`, float32 in [-1, 1]: clamped, as bicubic interpolation overshoots beside an edge."""
        return self.values.clamp(-1, 1).contiguous()


def to_image(samples: Samples, pixels: PixelFormat, background: RGB, full: bool = False) -> ArrayImage:
    """The channels of a file, with the range of the data at [-1, 1].

    Args:
        samples: content of the file.
        pixels: channels and range of the data set.
        background: colour behind transparent images of 1 or 3 channels, in 0..255.
        full: use the whole range of the file's integers instead: 0..65535 in a 16-bit file, 0..255 in an 8-bit file.

    Raises:
        MismatchError: other channels, NaN or infinity, or a value out of range; the message says which.
    """
    if full:
        pixels = PixelFormat(pixels.channels, full_range(samples.array.dtype))
    array = fit_channels(samples, pixels.channels, background, pixels.value_range)
    if not full:
        _check_range(array, pixels)
    array = np.require(array, requirements=["C", "W"])  # torch takes no other
    values = torch.from_numpy(array).permute(2, 0, 1)  # (H, W, C) -> (C, H, W)
    return ArrayImage(pixels.normalize(values).contiguous())


def fit_channels(samples: Samples, channels: int, background: RGB, value_range: tuple[float, float]) -> np.ndarray:
    """The samples as `(H, W, C)` in native byte order; raises `MismatchError` if the file has other channels.

    Only colours are converted, and only to 1 or 3 channels: alpha is composited over `background` (whose 0 and 255
    are the ends of `value_range`), grey is repeated, RGB becomes luma (ITU-R BT.601).
    """
    array, colours = samples
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if array.shape[2] == channels:
        return array
    if not colours or channels not in (1, 3):
        advice = f"set data.channels={array.shape[2]}" if array.shape[2] else "it is empty"
        raise MismatchError(f"{array.shape[2]} channel(s), but data.channels={channels}: {advice}, or give other files")
    if array.shape[2] in (2, 4):
        array = _composited(array, background, value_range)
    if array.shape[2] == channels:
        return array
    return array.repeat(3, axis=2) if channels == 3 else array @ np.array(LUMA_CHROMA[0])[:, None]


def full_range(dtype: np.dtype) -> tuple[float, float]:
    """Range of 8-bit or 16-bit unsigned integers. Raises `MismatchError` for other types, whose white is unknown."""
    kind = dtype.newbyteorder("=")
    if kind not in FULL:
        advice = "give data.value_range=[LOW,HIGH], or data.value_range=measure"
        raise MismatchError(f"values of type {kind.name}, of which none is known to be black or white: {advice}")
    return FULL[kind]


def extremes(array: np.ndarray) -> tuple[float, float]:
    """The smallest and the largest value. Raises `MismatchError` for NaN and infinity."""
    low, high = array.min(), array.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        raise MismatchError(f"holds {'NaN' if np.isnan(low) else 'infinity'}")
    return float(low), float(high)


def turned(array: np.ndarray, turn: Image.Transpose | None) -> np.ndarray:
    """`(H, W, S)` after Pillow's transpose."""
    return array if turn is None else TURNS[turn](array)


def _check_range(array: np.ndarray, pixels: PixelFormat) -> None:
    found, (low, high) = extremes(array), pixels.value_range
    rounding = ROUNDING * (high - low)
    for value in found:
        if not low - rounding <= value <= high + rounding:
            there = f"data.value_range=[{low:.10g},{high:.10g}]"
            raise MismatchError(
                f"holds the value {value:.10g}, outside of {there}: widen it, or data.value_range=measure"
            )


def _composited(array: np.ndarray, background: RGB, value_range: tuple[float, float]) -> np.ndarray:
    """Grey or RGB with alpha, unsigned integers `(H, W, 2 or 4)` -> RGB `(H, W, 3)`, float64."""
    low, high = value_range
    behind = low + np.array(background) * ((high - low) / 255)
    alpha = array[..., -1:] / full_range(array.dtype)[1]
    return array[..., :-1] * alpha + behind * (1 - alpha)

"""Number of channels and range of an image's values: from the data's units to the networks' [-1, 1], and back."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm_lab.utils.errors import UserError


@dataclass(frozen=True)
class PixelFormat:
    """Channels of the images, and the two values that the networks see as -1 and 1.

    Attributes:
        channels: number of channels.
        value_range: (low, high), in the data's own units.

    Raises:
        UserError: `channels` is below 1, or low is not below high, or one of them is not finite.
    """

    channels: int = 3
    value_range: tuple[float, float] = (0.0, 255.0)

    def __post_init__(self) -> None:
        low, high = self.value_range
        if self.channels < 1:
            raise UserError(f"data.channels={self.channels}: give the number of channels, 1 or more")
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise UserError(f"data.value_range=[{low:g},{high:g}]: give two finite values, the lower one first")

    def __str__(self) -> str:
        low, high = self.value_range
        return f"{self.channels} channel(s) from {low:g} to {high:g}"

    @property
    def is_8_bit(self) -> bool:
        """Whether the values are those of ordinary 8-bit pictures."""
        return self.value_range == (0.0, 255.0)

    @property
    def is_picture(self) -> bool:
        """Whether ordinary 8-bit pictures, grey or RGB, hold these images as they are."""
        return self.is_8_bit and self.channels in (1, 3)

    def normalize(self, values: Tensor) -> Tensor:
        """Values in the data's units, any shape and dtype -> float32, `value_range` to [-1, 1]."""
        low, high = self.value_range
        return (values.double() - low).mul_(2 / (high - low)).sub_(1).float()

    def denormalize(self, images: Tensor) -> Tensor:
        """[-1, 1], any shape -> float32 in the data's units, clamped to `value_range`."""
        low, high = self.value_range
        values = images.double().add(1).mul_((high - low) / 2).add_(low).float()
        return values.clamp_(*_float32_within(low, high))


def _float32_within(low: float, high: float) -> tuple[float, float]:
    """The smallest and the largest float32 from `low` to `high`."""
    ends = torch.tensor([low, high], dtype=torch.float64)
    rounded, inwards = ends.float(), torch.tensor([math.inf, -math.inf])
    outside = (rounded.double() - ends) * inwards.sign() < 0
    first, last = torch.where(outside, torch.nextafter(rounded, inwards), rounded).tolist()
    return first, last


RGB_8_BIT = PixelFormat()

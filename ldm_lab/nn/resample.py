"""Halving and doubling of a feature map's resolution.

The layers are called as residual blocks are, one of which may stand in their place: they take a time embedding, and
make no use of it.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Downsample(nn.Module):
    """A 3x3 convolution of stride 2.

    Args:
        channels: channels of the feature map.
        padding: 1 pads all four sides (UNets); 0 pads the right and the bottom only (autoencoders). Both halve
            an even resolution, but their pixels lie differently, so that weights fit one of them only.
    """

    def __init__(self, channels: int, padding: int = 1) -> None:
        super().__init__()
        self.padding = padding
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor, time_embedding: Tensor | None = None) -> Tensor:
        """`(B, C, H, W) -> (B, C, H/2, W/2)`."""
        return self.conv(x if self.padding else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Every pixel four times, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, time_embedding: Tensor | None = None) -> Tensor:
        """`(B, C, H, W) -> (B, C, 2H, 2W)`."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))

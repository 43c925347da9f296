"""Halving and doubling of a feature map's resolution.

The layers are called as residual blocks are, one of which may stand in their place: they take a time embedding, and
make no use of it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_lab.models.layers.cpu import takes_own_way


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


# Along one side, which of the three taps (columns) of a convolution of the doubled map meet the same input, for each of
# the four outputs (rows) that this input reaches.
_SHARED_TAPS = ((0, 0, 1), (0, 1, 1), (1, 1, 0), (1, 0, 0))


class Upsample(nn.Module):
    """Every pixel four times, then a 3x3 convolution.

    Both are one transposed convolution: an output pixel meets 2x2 pixels of the small map, each under the sum of the
    taps that would meet its copies, which is 16 multiplications instead of 36. CPUs compute it so (see
    `takes_own_way`) where the map is not so small that making the kernel takes longer.
    """

    SMALL = 16 * 16  # positions

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, time_embedding: Tensor | None = None) -> Tensor:
        """`(B, C, H, W) -> (B, C, 2H, 2W)`."""
        if self._pays(x):
            return F.conv_transpose2d(x, self._kernel(), self.conv.bias, stride=2, padding=1)
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))

    def _pays(self, x: Tensor) -> bool:
        large = x.shape[-2] * x.shape[-1] > self.SMALL
        return large and takes_own_way(x, self.conv.weight, torch.float32, torch.bfloat16)

    def _kernel(self) -> Tensor:
        """The weights of the transposed convolution, `(C_in, C_out, 4, 4)`."""
        weight = self.conv.weight
        shared = weight.new_tensor(_SHARED_TAPS)
        taps = weight.permute(2, 3, 0, 1).reshape(9, -1)  # (C_out, C_in, 3, 3) -> (9, C_out*C_in)
        taps = torch.kron(shared, shared) @ taps  # (9, C_out*C_in) -> (16, C_out*C_in)
        return taps.view(4, 4, *weight.shape[:2]).permute(3, 2, 0, 1)  # -> (C_in, C_out, 4, 4)

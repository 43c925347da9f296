"""Layers that halve or double the resolution of a feature map.

The layers accept and ignore a time embedding, as a residual block may replace them.
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
        padding: 1 pads all four sides (UNets); 0 pads only right and bottom (autoencoders). Both halve an even
            resolution, but at different pixel positions, so trained weights fit only one of them.
    """

    def __init__(self, channels: int, padding: int = 1) -> None:
        super().__init__()
        self.padding = padding
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor, time_embedding: Tensor | None = None) -> Tensor:
        """`(B, C, H, W) -> (B, C, H/2, W/2)`."""
        return self.conv(x if self.padding else F.pad(x, (0, 1, 0, 1)))


# Along one side, the taps (columns) of a convolution of the doubled map that meet the same input, for each of the four
# outputs (rows) of this input.
_SHARED_TAPS = ((0, 0, 1), (0, 1, 1), (1, 1, 0), (1, 0, 0))


class Upsample(nn.Module):
    """Nearest-neighbour upsampling by 2, then a 3x3 convolution.

    Both together are one transposed convolution: an output pixel depends on 2x2 pixels of the small map, each with the
    sum of the taps of its copies, which takes 16 multiplications instead of 36. CPUs use this form (see
    `takes_own_way`), unless the map is so small that computing the kernel takes longer.
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
        """Kernel of the transposed convolution, `(C_in, C_out, 4, 4)`."""
        weight = self.conv.weight
        shared = weight.new_tensor(_SHARED_TAPS)
        taps = weight.permute(2, 3, 0, 1).reshape(9, -1)  # (C_out, C_in, 3, 3) -> (9, C_out*C_in)
        taps = torch.kron(shared, shared) @ taps  # (9, C_out*C_in) -> (16, C_out*C_in)
        return taps.view(4, 4, *weight.shape[:2]).permute(3, 2, 0, 1)  # -> (C_in, C_out, 4, 4)

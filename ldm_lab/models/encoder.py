"""The encoder of an autoencoder: images to feature maps of lower resolution."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from ldm_lab.models.layers.attention import AttentionBlock
from ldm_lab.models.layers.blocks import DownBlock, MidBlock
from ldm_lab.models.layers.resample import Downsample
from ldm_lab.models.layers.resnet import ResnetBlock
from ldm_lab.utils.arguments import by_block

HAS_ATTENTION = {"DownEncoderBlock2D": False, "AttnDownEncoderBlock2D": True}
EPS = 1e-6  # epsilon of every normalisation in autoencoders; an argument in the UNet


class Encoder(nn.Module):
    """Convolution, one block per resolution, middle block, normalisation, convolution.

    Args:
        in_channels: channels of the image.
        out_channels: channels of the output.
        down_block_types: per resolution, highest first: `DownEncoderBlock2D`, or `AttnDownEncoderBlock2D` with
            attention after each residual block.
        block_out_channels: width per resolution; every block but the last halves height and width.
        layers_per_block: residual blocks per resolution.
        norm_num_groups: groups of every normalisation.
        mid_block_add_attention: whether the middle block has attention (one head).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        down_block_types: Sequence[str],
        block_out_channels: Sequence[int],
        layers_per_block: int,
        norm_num_groups: int = 32,
        mid_block_add_attention: bool = True,
    ) -> None:
        super().__init__()
        resnet = partial(ResnetBlock, groups=norm_num_groups, eps=EPS)
        attention = partial(AttentionBlock, groups=norm_num_groups, eps=EPS)
        attended = by_block("down_block_types", down_block_types, HAS_ATTENTION)

        width, last = block_out_channels[0], len(block_out_channels) - 1
        self.conv_in = nn.Conv2d(in_channels, width, 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for level, out_width in enumerate(block_out_channels):
            layers = {
                "attention": attention if attended[level] else nn.Identity,
                "downsample": None if level == last else partial(Downsample, padding=0),
            }
            self.down_blocks.append(DownBlock(width, out_width, layers_per_block, resnet, **layers))
            width = out_width
        self.mid_block = MidBlock(width, resnet, attention if mid_block_add_attention else nn.Identity)
        self.conv_norm_out = nn.GroupNorm(norm_num_groups, width, EPS)
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, in_channels, H, W)` in [-1, 1] -> `(B, out_channels, H/f, W/f)`."""
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        x = self.mid_block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))

"""The decoder of an autoencoder: feature maps to images."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from ldm_lab.models.encoder import EPS
from ldm_lab.models.layers.attention import AttentionBlock
from ldm_lab.models.layers.blocks import MidBlock, UpBlock
from ldm_lab.models.layers.resample import Upsample
from ldm_lab.models.layers.resnet import ResnetBlock
from ldm_lab.utils.arguments import by_block

HAS_ATTENTION = {"UpDecoderBlock2D": False, "AttnUpDecoderBlock2D": True}


class Decoder(nn.Module):
    """The mirrored encoder, with one more residual block per resolution.

    Args:
        in_channels: channels of the latents.
        out_channels: channels of the image.
        up_block_types: per resolution, lowest first: `UpDecoderBlock2D` or `AttnUpDecoderBlock2D`.
        block_out_channels: width per resolution, highest resolution first, as in the encoder.
        layers_per_block: residual blocks per resolution of the encoder.
        norm_num_groups: groups of every normalisation.
        mid_block_add_attention: whether the middle block has attention (one head).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        up_block_types: Sequence[str],
        block_out_channels: Sequence[int],
        layers_per_block: int,
        norm_num_groups: int = 32,
        mid_block_add_attention: bool = True,
    ) -> None:
        super().__init__()
        resnet = partial(ResnetBlock, groups=norm_num_groups, eps=EPS)
        attention = partial(AttentionBlock, groups=norm_num_groups, eps=EPS)
        attended = by_block("up_block_types", up_block_types, HAS_ATTENTION)

        width, last = block_out_channels[-1], len(block_out_channels) - 1
        self.conv_in = nn.Conv2d(in_channels, width, 3, padding=1)
        self.mid_block = MidBlock(width, resnet, attention if mid_block_add_attention else nn.Identity)
        self.up_blocks = nn.ModuleList()
        for level, out_width in enumerate(reversed(block_out_channels)):
            layers = {
                "attention": attention if attended[level] else nn.Identity,
                "upsample": None if level == last else Upsample,
            }
            self.up_blocks.append(UpBlock(width, out_width, [0] * (layers_per_block + 1), resnet, **layers))
            width = out_width
        self.conv_norm_out = nn.GroupNorm(norm_num_groups, width, EPS)
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """`(B, in_channels, h, w) -> (B, out_channels, f*h, f*w)`, about in [-1, 1] (nothing clamps it)."""
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))

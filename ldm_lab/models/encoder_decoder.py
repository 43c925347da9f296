"""Encoder and decoder of an autoencoder: images to feature maps of lower resolution, and back."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from ldm_lab.models.layers.attention import AttentionBlock
from ldm_lab.models.layers.blocks import MidBlock, down_path, up_path
from ldm_lab.models.layers.resample import Downsample, Upsample
from ldm_lab.models.layers.resnet import ResnetBlock
from ldm_lab.utils.arguments import by_block

DOWN_HAS_ATTENTION = {"DownEncoderBlock2D": False, "AttnDownEncoderBlock2D": True}
UP_HAS_ATTENTION = {"UpDecoderBlock2D": False, "AttnUpDecoderBlock2D": True}
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
        resnet, attention = _layers(norm_num_groups)
        attended = by_block("down_block_types", down_block_types, DOWN_HAS_ATTENTION)
        attentions = [attention if yes else nn.Identity for yes in attended]
        downsamples = [partial(Downsample, padding=0)] * len(attended)
        first, last = block_out_channels[0], block_out_channels[-1]
        self.conv_in = nn.Conv2d(in_channels, first, 3, padding=1)
        self.down_blocks = down_path(block_out_channels, layers_per_block, resnet, attentions, downsamples)
        self.mid_block = MidBlock(last, resnet, attention if mid_block_add_attention else nn.Identity)
        self.conv_norm_out = nn.GroupNorm(norm_num_groups, last, EPS)
        self.conv_out = nn.Conv2d(last, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, in_channels, H, W)` in [-1, 1] -> `(B, out_channels, H/f, W/f)`."""
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        x = self.mid_block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class Decoder(nn.Module):
    """The mirrored encoder, with one more residual block per resolution.

    The last four arguments are those of the encoder.

    Args:
        in_channels: channels of the latents.
        out_channels: channels of the image.
        up_block_types: per resolution, lowest first: `UpDecoderBlock2D` or `AttnUpDecoderBlock2D`.
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
        resnet, attention = _layers(norm_num_groups)
        attended = by_block("up_block_types", up_block_types, UP_HAS_ATTENTION)
        attentions = [attention if yes else nn.Identity for yes in attended]
        no_skips = [[0] * (layers_per_block + 1)] * len(attended)
        widths = block_out_channels[::-1]
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], resnet, attention if mid_block_add_attention else nn.Identity)
        self.up_blocks = up_path(widths, no_skips, resnet, attentions, [Upsample] * len(attended))
        self.conv_norm_out = nn.GroupNorm(norm_num_groups, widths[-1], EPS)
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """`(B, in_channels, h, w) -> (B, out_channels, f*h, f*w)`, about in [-1, 1] (nothing clamps it)."""
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


def _layers(groups: int) -> tuple[partial, partial]:
    """Constructors of residual blocks and attention that lack the numbers of channels."""
    return partial(ResnetBlock, groups=groups, eps=EPS), partial(AttentionBlock, groups=groups, eps=EPS)

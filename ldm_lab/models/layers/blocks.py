"""Blocks of one resolution: residual blocks, optional attention, and down- or upsampling.

Autoencoder and UNet use the same three blocks, and the same two ways through the resolutions. The blocks receive
their layers as functions of the numbers of channels (`resnet(in, out)`, `attention(channels)`, ...), with all other
arguments bound. For a UNet's skip connections, `DownBlock`s append their states to the list `skips`, and `UpBlock`s
pop them, last state first; an autoencoder passes no list.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

MakeResnet = Callable[[int, int], nn.Module]
MakeLayer = Callable[[int], nn.Module]  # `nn.Identity` stands for no layer, as it has no parameters


class DownBlock(nn.Module):
    """`num_layers` residual blocks, each followed by `attention`; then `downsample`, if given."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_layers: int,
        resnet: MakeResnet,
        attention: MakeLayer = nn.Identity,
        downsample: MakeLayer | None = None,
    ) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * (num_layers - 1)
        self.resnets = nn.ModuleList(resnet(width, out_channels) for width in widths)
        self.attentions = nn.ModuleList(attention(out_channels) for _ in widths)
        self.downsamplers = None if downsample is None else nn.ModuleList([downsample(out_channels)])

    def forward(self, x: Tensor, time_embedding: Tensor | None = None, skips: list[Tensor] | None = None) -> Tensor:
        """`(B, in_channels, H, W) -> (B, out_channels, H/2, W/2)`, or `H, W` without downsampling."""
        for resnet, attention in zip(self.resnets, self.attentions, strict=True):
            x = attention(resnet(x, time_embedding))
            if skips is not None:
                skips.append(x)
        if self.downsamplers is not None:
            x = self.downsamplers[0](x, time_embedding)
            if skips is not None:
                skips.append(x)
        return x


class MidBlock(nn.Module):
    """At the lowest resolution: a residual block, `attention`, a residual block."""

    def __init__(self, channels: int, resnet: MakeResnet, attention: MakeLayer = nn.Identity) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnet(channels, channels) for _ in range(2))
        self.attentions = nn.ModuleList([attention(channels)])

    def forward(self, x: Tensor, time_embedding: Tensor | None = None) -> Tensor:
        """`(B, C, H, W) -> (B, C, H, W)`."""
        x = self.attentions[0](self.resnets[0](x, time_embedding))
        return self.resnets[1](x, time_embedding)


class UpBlock(nn.Module):
    """Residual blocks, each followed by `attention`; then `upsample`, if given.

    `skip_channels` has one entry per residual block: the channels of the skip connection to concatenate; 0: none.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        skip_channels: Sequence[int],
        resnet: MakeResnet,
        attention: MakeLayer = nn.Identity,
        upsample: MakeLayer | None = None,
    ) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * (len(skip_channels) - 1)
        self.resnets = nn.ModuleList(
            resnet(width + skip, out_channels) for width, skip in zip(widths, skip_channels, strict=True)
        )
        self.attentions = nn.ModuleList(attention(out_channels) for _ in widths)
        self.upsamplers = None if upsample is None else nn.ModuleList([upsample(out_channels)])

    def forward(self, x: Tensor, time_embedding: Tensor | None = None, skips: list[Tensor] | None = None) -> Tensor:
        """`(B, in_channels, H, W) -> (B, out_channels, 2H, 2W)`, or `H, W` without upsampling."""
        for resnet, attention in zip(self.resnets, self.attentions, strict=True):
            if skips is not None:
                x = torch.cat([x, skips.pop()], dim=1)  # (B, C, H, W) -> (B, C + skip, H, W)
            x = attention(resnet(x, time_embedding))
        return x if self.upsamplers is None else self.upsamplers[0](x, time_embedding)


def down_path(
    widths: Sequence[int],
    num_layers: int,
    resnet: MakeResnet,
    attentions: Sequence[MakeLayer],
    downsamples: Sequence[MakeLayer],
) -> nn.ModuleList:
    """A `DownBlock` for each of `widths`, highest resolution first; all but the last halve the resolution."""
    blocks = nn.ModuleList()
    for level, width in enumerate(widths):
        downsample = downsamples[level] if level < len(widths) - 1 else None
        before = widths[max(level - 1, 0)]
        blocks.append(DownBlock(before, width, num_layers, resnet, attentions[level], downsample))
    return blocks


def up_path(
    widths: Sequence[int],
    skips: Sequence[Sequence[int]],
    resnet: MakeResnet,
    attentions: Sequence[MakeLayer],
    upsamples: Sequence[MakeLayer],
) -> nn.ModuleList:
    """An `UpBlock` for each of `widths`, lowest resolution first; all but the last double the resolution."""
    blocks = nn.ModuleList()
    for level, width in enumerate(widths):
        upsample = upsamples[level] if level < len(widths) - 1 else None
        before = widths[max(level - 1, 0)]
        blocks.append(UpBlock(before, width, skips[level], resnet, attentions[level], upsample))
    return blocks

"""A start for autoencoders that knows colours: the latents are a thumbnail of the image, and the decoder enlarges them.

From random weights, brightness is learned long before hues. A GroupNorm subtracts the mean of each group of channels,
and so takes the mean colour of an image away, unless one group holds both the colour and something to compare it with.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ldm_lab.models.encoder_decoder import Decoder, Encoder
from ldm_lab.models.first_stage import FirstStage
from ldm_lab.models.layers.attention import AttentionBlock
from ldm_lab.models.layers.resample import Downsample, Upsample
from ldm_lab.models.layers.resnet import ResnetBlock
from ldm_lab.utils.errors import UserError

CONSTANT = 4.0  # far above a colour, which is within [-1, 1], so that all images have about the same group deviation
MEAN_SQUARE = 0.3  # of a colour
LOG_VARIANCE = -6.0  # of a KL first stage: a posterior deviation of 0.05
WIDTHS = {"latent_channels", "norm_num_groups", "block_out_channels"}  # settings that `fits` reads
Columns = Sequence[tuple[int, float]]  # for the channel of +x and that of -x: the input channel, and its weight


@torch.no_grad()
def start_as_thumbnail(autoencoder: FirstStage) -> None:
    """Set weights in place: each latent is the mean colour of f x f pixels, each pixel the colour of its latent.

    A colour is a channel of the image, whatever it shows. For each colour x, four channels of one group hold x, -x,
    c and -c with a constant c. Their mean is 0 and their deviation nearly constant, so the normalisation leaves x
    as it is but for a known factor; and as silu(x) - silu(-x) = x, the convolution behind it reads x exactly.
    Residual branches start at zero. All other weights stay as they are: training may use their features, and change
    those of the thumbnail.

    Args:
        autoencoder: a first stage with at least as many latent channels as colours; the first ones become the colours.

    Raises:
        UserError: the groups of the normalisation are too small for these channels, or there are too few latents.
    """
    groups, colours = autoencoder.config.norm_num_groups, autoencoder.config.in_channels
    if autoencoder.embed_dim < colours:
        number = "three" if colours == 3 else colours
        raise UserError(f"model.start=thumbnail: {autoencoder.embed_dim} latent channels cannot hold {number} colours")
    for module in autoencoder.modules():
        if isinstance(module, (ResnetBlock, AttentionBlock)):
            last = module.conv2 if isinstance(module, ResnetBlock) else module.to_out[0]
            last.weight.zero_()
            last.bias.zero_()
    for half in (autoencoder.encoder, autoencoder.decoder):
        _carry_colours(half, groups, colours)
    for conv in (autoencoder.quant_conv, autoencoder.post_quant_conv):
        for colour in range(colours):
            _write(conv, colour, {colour: 1.0})
    if autoencoder.draws_latents:
        log_variance = slice(autoencoder.quant_conv.out_channels // 2, None)
        autoencoder.quant_conv.weight[log_variance].zero_()
        autoencoder.quant_conv.bias[log_variance] = LOG_VARIANCE


def fits(config: Mapping[str, Any], colours: int) -> bool:
    """Whether a first stage of this config, as plain data, can start as a thumbnail of so many colours."""
    latents = config.get("vq_embed_dim") or config["latent_channels"]
    groups, width = config["norm_num_groups"], min(config["block_out_channels"])
    return latents >= colours and width // groups >= _needed(colours, groups)


def _needed(colours: int, groups: int) -> int:
    """Channels of a group that carry colours: four for each of the colours that share the group."""
    return 4 * -(-colours // groups)


def _carry_colours(network: Encoder | Decoder, groups: int, colours: int) -> None:
    """From the first convolution to the last; both read and write colours as their first channels."""
    _carry(network.conv_in, groups, [((colour, 1.0), (colour, -1.0)) for colour in range(colours)])
    for module in network.modules():
        shortcut = module.conv_shortcut if isinstance(module, ResnetBlock) else None
        conv = module.conv if isinstance(module, (Downsample, Upsample)) else shortcut
        if conv is not None:
            places = _places(conv.in_channels, groups, colours)
            for plus in places:
                conv.weight[:, plus + 2 : plus + 4].zero_()  # or the constants would swamp all other features
            sources = [((plus, 1.0), (plus + 1, 1.0)) for plus in places]
            _carry(conv, groups, sources, shrinks=isinstance(module, Downsample))
    size, out = network.conv_out.in_channels // groups, network.conv_out
    for colour, plus in enumerate(_places(out.in_channels, groups, colours)):
        together = len(range(colour % groups, colours, groups))  # colours that share this group
        deviation = math.sqrt(together * 2 * (CONSTANT**2 + MEAN_SQUARE) / size)
        _write(out, colour, {plus: deviation, plus + 1: -deviation})


def _places(channels: int, groups: int, colours: int) -> list[int]:
    """For each colour the first of its four channels, in groups of their own where there are as many groups."""
    size, needed = channels // groups, _needed(colours, groups)
    if size < needed:
        raise UserError(
            f"model.start=thumbnail: {channels} channels in model.autoencoder.norm_num_groups={groups} groups are"
            f" {size} a group, and colours need {needed}: choose fewer groups, or model.start=random"
        )
    return [colour % groups * size + 4 * (colour // groups) for colour in range(colours)]


def _carry(conv: nn.Conv2d, groups: int, sources: Sequence[Columns], shrinks: bool = False) -> None:
    """Set the four output channels of each colour."""
    for plus, columns in zip(_places(conv.out_channels, groups, len(sources)), sources, strict=True):
        for place, (column, weight) in enumerate(columns):
            _write(conv, plus + place, {column: weight}, shrinks=shrinks)
        _write(conv, plus + 2, {}, CONSTANT)
        _write(conv, plus + 3, {}, -CONSTANT)


def _write(conv: nn.Conv2d, row: int, weights: Mapping[int, float], bias: float = 0.0, shrinks: bool = False) -> None:
    """Let an output channel be a sum of input channels, pixel by pixel, or the mean of 2 x 2 pixels if it `shrinks`."""
    conv.weight[row].zero_()
    conv.bias[row] = bias
    middle = conv.kernel_size[0] // 2
    for column, weight in weights.items():
        if shrinks:
            conv.weight[row, column, :2, :2] = weight / 4  # the padding is on the right and below
        else:
            conv.weight[row, column, middle, middle] = weight

"""Infers the config of CompVis networks from names and shapes of tensors, for checkpoints without a YAML file.

The result has the format of CompVis's files, so that the same code reads both. Tensors determine everything except
the number of heads of an attention and the image size.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

from torch import Tensor

from ldm_lab.checkpoints.state_dicts import State
from ldm_lab.utils.reading import MAX_LAYERS, MAX_LEVELS, LoadError

# Values of every published unconditional model.
RESOLUTION = 256  # pixels
HEAD_CHANNELS = 32  # of VQ models; the churches model, the only one with scale-shift normalisation, ...
HEADS = 8  # ... has a fixed number of heads instead


def first_stage(state: State) -> dict[str, Any]:
    """`target` and `params` of the autoencoder with these tensors (without prefix).

    Raises:
        LoadError: the tensors do not belong to an autoencoder.
    """
    encoder_in, decoder_out = _find(state, "encoder.conv_in.weight"), _find(state, "decoder.conv_out.weight")
    z_channels, embed_dim = _find(state, "post_quant_conv.weight").shape[:2]
    first_convs = [f"encoder.down.{level}.block.0.conv1.weight" for level in _count(state, "encoder.down.{}.block.0.")]
    params: dict[str, Any] = {"embed_dim": embed_dim}
    if codebook := "quantize.embedding.weight" in state:
        params["n_embed"] = len(state["quantize.embedding.weight"])
    params["ddconfig"] = {
        "double_z": not codebook,
        "z_channels": z_channels,
        "resolution": RESOLUTION,
        "in_channels": encoder_in.shape[1],
        "out_ch": len(decoder_out),
        "ch": len(encoder_in),
        "ch_mult": [len(_find(state, name)) // len(encoder_in) for name in first_convs],
        "num_res_blocks": len(_count(state, "encoder.down.0.block.{}.")),
        "attn_resolutions": [
            RESOLUTION // 2**level
            for level in range(len(first_convs))
            if f"encoder.down.{level}.attn.0.q.weight" in state
        ],
        "attn_type": "vanilla" if "encoder.mid.attn_1.q.weight" in state else "none",
    }
    return {"target": "VQModel" if codebook else "AutoencoderKL", "params": params}


def unet(state: State, image_size: int) -> dict[str, Any]:
    """`params` of the `UNetModel` with these tensors (without prefix).

    Args:
        state: `time_embed.*`, `input_blocks.*`, `middle_block.*`, `output_blocks.*`, `out.*`.
        image_size: positions along one side of the latents.

    Raises:
        LoadError: the tensors do not belong to a `UNetModel`.
    """
    conv_in = _find(state, "input_blocks.0.0.weight")
    blocks = len(_count(state, "input_blocks.{}.0."))  # the first convolution and the layers, including downsamplers
    layers = _layers(state, blocks)
    starts = range(1, blocks, layers + 1)  # first layer of each level
    width = "input_blocks.{}.0.out_layers.3.weight"
    convolutions = [_find(state, width.format(start)) for start in starts]
    embedding = _find(state, "input_blocks.1.0.emb_layers.1.weight")
    return {
        "image_size": image_size,
        "in_channels": conv_in.shape[1],
        "out_channels": len(_find(state, "out.2.weight")),
        "model_channels": len(conv_in),
        "num_res_blocks": layers,
        "channel_mult": [len(convolution) // len(conv_in) for convolution in convolutions],
        "attention_resolutions": [
            2**level for level, start in enumerate(starts) if f"input_blocks.{start}.1.qkv.weight" in state
        ],
        "resblock_updown": f"input_blocks.{layers + 1}.0.in_layers.0.weight" in state and len(starts) > 1,
        **_normalisation(state, scale_and_shift=len(embedding) == 2 * len(convolutions[0])),
    }


def _layers(state: State, blocks: int) -> int:
    """Residual blocks per level; the decoder has one more, and the last is followed by an upsampler.

    An upsampler is a convolution or a residual block, after the residual block and the attention.
    """
    for index in range(blocks):
        places = itertools.product((1, 2), ("conv", "in_layers.0"))
        if any(f"output_blocks.{index}.{part}.{kind}.weight" in state for part, kind in places):
            return index
    return blocks - 1  # a single level has none


def _normalisation(state: State, scale_and_shift: bool) -> dict[str, Any]:
    """Arguments of the time embedding's entry and of the heads, which the tensors do not determine."""
    widths = {len(value) // 3 for name, value in state.items() if name.endswith(".qkv.weight")}
    if scale_and_shift:
        return {"use_scale_shift_norm": True, "num_heads": math.gcd(HEADS, *widths)}
    return {"num_head_channels": math.gcd(HEAD_CHANNELS, *widths)}


def _find(state: State, name: str) -> Tensor:
    if name not in state:
        raise LoadError(f"the architecture cannot be read off the tensors: there is no {name!r}")
    return state[name]


def _count(state: State, pattern: str) -> range:
    """The consecutive numbers, from 0, for which there are tensors that begin with `pattern`."""
    numbers = range(MAX_LEVELS * MAX_LAYERS)
    present = itertools.takewhile(lambda n: any(name.startswith(pattern.format(n)) for name in state), numbers)
    return range(len(list(present)))

"""Translates CompVis's UNet, `UNetModel`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from ldm_lab.checkpoints.compvis.translate import CONV, ITSELF, Module, check, check_first, check_sizes, linear, rename
from ldm_lab.utils.reading import LoadError

# Names below a module: CompVis's -> ours.
_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_ATTENTION = {"norm": "group_norm", "qkv": "to_qkv", "proj_out": "to_out.0"}
# A convolution, or a residual block with `resblock_updown`.
_DOWNSAMPLER = {"op": "conv", **_RESNET}
_UPSAMPLER = {**CONV, **_RESNET}

_SIZES = ("image_size", "in_channels", "out_channels", "model_channels", "num_res_blocks")
_NEEDED = (*_SIZES, "attention_resolutions")
_GROUPS = 32  # groups of every normalisation in CompVis's UNet

# Arguments that our architecture supports only with these values; None: with any value, or absent.
_FIXED = {
    "channel_mult": None,
    "dropout": None,
    "num_heads": None,
    "num_head_channels": None,
    "num_heads_upsample": None,
    "use_scale_shift_norm": (False, True),
    "resblock_updown": (False, True),
    "conv_resample": (True,),
    "dims": (2,),
    "num_classes": (None,),
    "use_new_attention_order": (False,),
    "use_spatial_transformer": (False,),
    "transformer_depth": (1,),
    "context_dim": (None,),
    "n_embed": (None,),
    "use_checkpoint": None,
    "use_fp16": None,
    "legacy": None,
}


def unet_config(params: dict[str, Any]) -> dict[str, Any]:
    """Arguments of our `UNet2DModel` from those of CompVis's `UNetModel` (`unet_config.params`).

    Raises:
        LoadError: an argument is missing, unknown, or has a value that our network does not support.
    """
    check("unet_config", params, _NEEDED, _FIXED)
    check_sizes("unet_config", params, _SIZES, lists=("attention_resolutions", "channel_mult"))
    multipliers = params.get("channel_mult", (1, 2, 4, 8))
    check_first("unet_config", "channel_mult", multipliers)
    by_resnet = params.get("resblock_updown", False)
    plain = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D") if by_resnet else ("DownBlock2D", "UpBlock2D")
    # CompVis's `attention_resolutions` are downsampling factors, not sizes.
    attended = [2**level in params["attention_resolutions"] for level in range(len(multipliers))]
    config = {
        "sample_size": params["image_size"],
        "in_channels": params["in_channels"],
        "out_channels": params["out_channels"],
        "down_block_types": ["AttnDownBlock2D" if attention else plain[0] for attention in attended],
        "up_block_types": ["AttnUpBlock2D" if attention else plain[1] for attention in reversed(attended)],
        "block_out_channels": [params["model_channels"] * factor for factor in multipliers],
        "layers_per_block": params["num_res_blocks"],
        "dropout": params.get("dropout", 0.0),
        **_heads(params),
    }
    if by_resnet:
        config |= {"downsample_type": "resnet", "upsample_type": "resnet"}
    if params.get("use_scale_shift_norm", False):
        # Without this, the middle attention has no normalisation, in diffusers as in our class.
        config |= {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": _GROUPS}
    return config


def _heads(params: dict[str, Any]) -> dict[str, int | None]:
    """The heads of all attentions; -1 means "not given"; if both number and size are given, the size decides."""
    size, number = params.get("num_head_channels", -1), params.get("num_heads", -1)
    if size != -1:
        return {"attention_head_dim": size}
    if number == -1:
        raise LoadError("unet_config: either num_head_channels or num_heads must be given")
    if (upsampling := params.get("num_heads_upsample", -1)) not in (-1, number):
        raise LoadError(f"unet_config: num_heads_upsample={upsampling} is not supported; num_heads={number} is")
    return {"attention_head_dim": None, "num_attention_heads": number}


def unet_state(state: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """Tensors of CompVis's `UNetModel` (without prefix) under our names.

    Args:
        state: `time_embed.*`, `input_blocks.*`, `middle_block.*`, `output_blocks.*`, `out.*`.
        config: the result of `unet_config`.

    Raises:
        LoadError: a tensor has no counterpart in a UNet of this config.
    """
    result: dict[str, Tensor] = {}
    for key, value in rename(state, _modules(config), "UNet2DModel").items():
        if ".to_qkv." in key:
            for name, part in zip("qkv", _split_heads(value, config), strict=True):
                result[key.replace(".to_qkv.", f".to_{name}.")] = part
        else:
            result[key] = linear(value) if ".to_out." in key else value
    return result


def _split_heads(qkv: Tensor, config: dict[str, Any]) -> Iterator[Tensor]:
    """A tensor `(heads * 3 * dim_head, ...)`, in this order -> query, key and value, `(C, C)` or `(C,)` each."""
    channels = len(qkv) // 3
    key = "attention_head_dim" if config["attention_head_dim"] else "num_attention_heads"
    if channels % config[key]:
        raise LoadError(f"{key}={config[key]} does not divide the {channels} channels of an attention")
    dim_head = config["attention_head_dim"] or channels // config["num_attention_heads"]
    per_head = qkv.unflatten(0, (-1, 3, dim_head))  # (heads, 3, dim_head, ...)
    return (linear(part.flatten(0, 1)) for part in per_head.unbind(1))


def _modules(config: dict[str, Any]) -> Iterator[Module]:
    yield "time_embed.0", "time_embedding.linear_1", ITSELF
    yield "time_embed.2", "time_embedding.linear_2", ITSELF
    yield "input_blocks.0.0", "conv_in", ITSELF
    yield "middle_block.0", "mid_block.resnets.0", _RESNET
    yield "middle_block.1", "mid_block.attentions.0", _ATTENTION
    yield "middle_block.2", "mid_block.resnets.1", _RESNET
    yield "out.0", "conv_norm_out", ITSELF
    yield "out.2", "conv_out", ITSELF
    # CompVis numbers all layers of one direction in sequence; a downsampler is a layer of its own ...
    layers = config["layers_per_block"]
    for level in range(len(config["block_out_channels"])):
        first = 1 + level * (layers + 1)
        for layer in range(layers):
            yield f"input_blocks.{first + layer}.0", f"down_blocks.{level}.resnets.{layer}", _RESNET
            yield f"input_blocks.{first + layer}.1", f"down_blocks.{level}.attentions.{layer}", _ATTENTION
        yield f"input_blocks.{first + layers}.0", f"down_blocks.{level}.downsamplers.0", _DOWNSAMPLER
    # ... but an upsampler is the last part of a layer, after its attention if it has one.
    for level, kind in enumerate(config["up_block_types"]):
        first = level * (layers + 1)
        for layer in range(layers + 1):
            yield f"output_blocks.{first + layer}.0", f"up_blocks.{level}.resnets.{layer}", _RESNET
            yield f"output_blocks.{first + layer}.1", f"up_blocks.{level}.attentions.{layer}", _ATTENTION
        part = 2 if kind.startswith("Attn") else 1
        yield f"output_blocks.{first + layers}.{part}", f"up_blocks.{level}.upsamplers.0", _UPSAMPLER

"""Translates CompVis's autoencoders, `VQModel` and `AutoencoderKL`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from ldm_lab.checkpoints.compvis.translate import CONV, ITSELF, Module, check, check_first, check_sizes, linear, rename
from ldm_lab.utils.reading import LoadError

# Names below a module: CompVis's -> ours.
_RESNET = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "nin_shortcut": "conv_shortcut"}
_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}

_SIZES = ("ch", "num_res_blocks", "z_channels", "resolution", "in_channels", "out_ch")
_LISTS = ("ch_mult", "attn_resolutions")
_NEEDED = _SIZES + _LISTS

# Arguments that our architecture supports only with these values; None: no effect on our architecture.
_FIXED = {
    "resamp_with_conv": (True,),
    "attn_type": ("vanilla", "none"),
    "use_linear_attn": (False,),
    "dropout": None,  # CompVis has dropout; diffusers' autoencoder has none
}


def vq_config(ddconfig: dict[str, Any], embed_dim: int, n_embed: int) -> dict[str, Any]:
    """Arguments of our `VQModel` from those of CompVis's (`first_stage_config.params`).

    Raises:
        LoadError: an argument is missing, unknown, or has a value that our network does not support.
    """
    check("ddconfig", ddconfig, _NEEDED, {**_FIXED, "double_z": (False,)})
    check_sizes("first_stage_config", {"embed_dim": embed_dim, "n_embed": n_embed}, ("embed_dim", "n_embed"))
    return {**_halves(ddconfig), "num_vq_embeddings": n_embed, "vq_embed_dim": embed_dim}


def kl_config(ddconfig: dict[str, Any], embed_dim: int) -> dict[str, Any]:
    """Arguments of our `AutoencoderKL` from those of CompVis's (`first_stage_config.params`).

    CompVis's arguments have no scaling factor: it is 1 here, and a checkpoint of stage 2 may hold another value.

    Raises:
        LoadError: an argument is missing, unknown, or has a value that our network does not support.
    """
    check("ddconfig", ddconfig, (*_NEEDED, "double_z"), {**_FIXED, "double_z": (True,)})
    if embed_dim != ddconfig["z_channels"]:
        raise LoadError(f"embed_dim={embed_dim} is not supported; z_channels={ddconfig['z_channels']} is")
    return {**_halves(ddconfig), "scaling_factor": 1.0}


def _halves(ddconfig: dict[str, Any]) -> dict[str, Any]:
    """Arguments that encoder and decoder share."""
    check_sizes("ddconfig", ddconfig, _SIZES, _LISTS)
    check_first("ddconfig", "ch_mult", ddconfig["ch_mult"])
    attention = ddconfig.get("attn_type", "vanilla") != "none"
    sides = [ddconfig["resolution"] // 2**level for level in range(len(ddconfig["ch_mult"]))]
    attended = ["Attn" if attention and side in ddconfig["attn_resolutions"] else "" for side in sides]
    return {
        "in_channels": ddconfig["in_channels"],
        "out_channels": ddconfig["out_ch"],
        "down_block_types": [f"{prefix}DownEncoderBlock2D" for prefix in attended],
        "up_block_types": [f"{prefix}UpDecoderBlock2D" for prefix in reversed(attended)],
        "block_out_channels": [ddconfig["ch"] * factor for factor in ddconfig["ch_mult"]],
        "layers_per_block": ddconfig["num_res_blocks"],
        "latent_channels": ddconfig["z_channels"],
        "sample_size": ddconfig["resolution"],
        "mid_block_add_attention": attention,
    }


def autoencoder_state(state: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """Tensors of CompVis's `VQModel` or `AutoencoderKL` (without prefix) under our names.

    Args:
        state: `encoder.*`, `decoder.*`, `quant_conv.*`, `post_quant_conv.*`, and `quantize.*` of a `VQModel`.
        config: the result of `vq_config` or `kl_config`.

    Raises:
        LoadError: a tensor has no counterpart in an autoencoder of this config.
    """
    with_codes = "num_vq_embeddings" in config
    modules = _modules(config, *(["quantize.embedding"] if with_codes else []))
    renamed = rename(state, modules, "VQModel" if with_codes else "AutoencoderKL")
    return {key: linear(value) if ".to_" in key else value for key, value in renamed.items()}


def _modules(config: dict[str, Any], *extra: str) -> Iterator[Module]:
    levels, layers = len(config["block_out_channels"]), config["layers_per_block"]
    for name in ("quant_conv", "post_quant_conv", *extra):
        yield name, name, ITSELF
    for half in ("encoder", "decoder"):
        for name, ours in {"conv_in": "conv_in", "norm_out": "conv_norm_out", "conv_out": "conv_out"}.items():
            yield f"{half}.{name}", f"{half}.{ours}", ITSELF
        yield f"{half}.mid.block_1", f"{half}.mid_block.resnets.0", _RESNET
        yield f"{half}.mid.attn_1", f"{half}.mid_block.attentions.0", _ATTENTION
        yield f"{half}.mid.block_2", f"{half}.mid_block.resnets.1", _RESNET
    for level in range(levels):
        # CompVis counts from the highest resolution in encoder and decoder; we count in execution order.
        sides = (
            (f"encoder.down.{level}", f"encoder.down_blocks.{level}", layers),
            (f"decoder.up.{level}", f"decoder.up_blocks.{levels - 1 - level}", layers + 1),
        )
        for theirs, ours, count in sides:
            for layer in range(count):
                yield f"{theirs}.block.{layer}", f"{ours}.resnets.{layer}", _RESNET
                yield f"{theirs}.attn.{layer}", f"{ours}.attentions.{layer}", _ATTENTION
        yield f"encoder.down.{level}.downsample", f"encoder.down_blocks.{level}.downsamplers.0", CONV
        yield f"decoder.up.{level}.upsample", f"decoder.up_blocks.{levels - 1 - level}.upsamplers.0", CONV

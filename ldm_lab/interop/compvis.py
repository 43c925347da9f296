"""CompVis/latent-diffusion: its configs and tensor names, translated to ours (those of diffusers).

Every function takes plain data and returns plain data. A config is translated first; the names depend on it:

    config = unet_config(params)
    UNet2DModel(**config).load_weights(unet_state(state, config), origin="model.ckpt")

Tensors that the original has and ours do not, or settings that ours cannot express, are a `LoadError`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from ldm_lab.serialization import LoadError

# Names below a module, theirs -> ours. The empty name stands for the module itself.
_RESNET_VQ = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "nin_shortcut": "conv_shortcut"}
_RESNET_UNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_ATTENTION_VQ = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_ATTENTION_UNET = {"norm": "group_norm", "qkv": "to_qkv", "proj_out": "to_out.0"}
_CONV = {"conv": "conv"}
_STRIDED_CONV = {"op": "conv"}
_ITSELF = {"": ""}

Module = tuple[str, str, dict[str, str]]  # their prefix, our prefix, the names below

# Arguments of the original that our architecture covers with one value only, or that have no effect on it (None).
_VQ_FIXED = {
    "double_z": (False,),
    "resamp_with_conv": (True,),
    "attn_type": ("vanilla", "none"),
    "use_linear_attn": (False,),
    "dropout": None,  # theirs; the namesake's autoencoder has none
}
_UNET_FIXED = {
    "conv_resample": (True,),
    "dims": (2,),
    "num_classes": (None,),
    "num_heads": (-1,),
    "num_heads_upsample": (-1,),
    "use_scale_shift_norm": (False,),
    "resblock_updown": (False,),
    "use_new_attention_order": (False,),
    "use_spatial_transformer": (False,),
    "transformer_depth": (1,),
    "context_dim": (None,),
    "n_embed": (None,),
    "use_checkpoint": None,
    "use_fp16": None,
    "legacy": None,
}


def vq_config(ddconfig: dict[str, Any], embed_dim: int, n_embed: int) -> dict[str, Any]:
    """Arguments of our `VQModel` for those of CompVis's (`first_stage_config.params`).

    Raises:
        LoadError: an argument is missing, unknown, or asks for what ours cannot express.
    """
    needed = (
        "ch",
        "ch_mult",
        "num_res_blocks",
        "attn_resolutions",
        "z_channels",
        "resolution",
        "in_channels",
        "out_ch",
    )
    _check("ddconfig", ddconfig, needed, _VQ_FIXED)
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
        "num_vq_embeddings": n_embed,
        "vq_embed_dim": embed_dim,
        "mid_block_add_attention": attention,
    }


def unet_config(params: dict[str, Any]) -> dict[str, Any]:
    """Arguments of our `UNet2DModel` for those of CompVis's `UNetModel` (`unet_config.params`).

    Raises:
        LoadError: an argument is missing, unknown, or asks for what ours cannot express.
    """
    needed = ("image_size", "in_channels", "out_channels", "model_channels", "num_res_blocks", "num_head_channels")
    _check(
        "unet_config",
        params,
        (*needed, "attention_resolutions"),
        {**_UNET_FIXED, "channel_mult": None, "dropout": None},
    )
    multipliers = params.get("channel_mult", (1, 2, 4, 8))
    # "Resolutions" of attention are factors of downsampling there, not sizes.
    attended = ["Attn" if 2**level in params["attention_resolutions"] else "" for level in range(len(multipliers))]
    return {
        "sample_size": params["image_size"],
        "in_channels": params["in_channels"],
        "out_channels": params["out_channels"],
        "down_block_types": [f"{prefix}DownBlock2D" for prefix in attended],
        "up_block_types": [f"{prefix}UpBlock2D" for prefix in reversed(attended)],
        "block_out_channels": [params["model_channels"] * factor for factor in multipliers],
        "layers_per_block": params["num_res_blocks"],
        "dropout": params.get("dropout", 0.0),
        "attention_head_dim": params["num_head_channels"],
    }


def vq_model_state(state: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """Tensors of CompVis's `VQModel` (without prefix) under our names.

    Args:
        state: `encoder.*`, `decoder.*`, `quantize.*`, `quant_conv.*`, `post_quant_conv.*`.
        config: what `vq_config` returned.

    Raises:
        LoadError: a tensor has no counterpart in an autoencoder of this config.
    """
    renamed = _rename(state, [*_vq_modules(config)], "VQModel")
    return {key: _linear(value) if ".to_" in key else value for key, value in renamed.items()}


def unet_state(state: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """Tensors of CompVis's `UNetModel` (without prefix) under our names.

    Args:
        state: `time_embed.*`, `input_blocks.*`, `middle_block.*`, `output_blocks.*`, `out.*`.
        config: what `unet_config` returned.

    Raises:
        LoadError: a tensor has no counterpart in a UNet of this config.
    """
    result: dict[str, Tensor] = {}
    for key, value in _rename(state, [*_unet_modules(config)], "UNet2DModel").items():
        if ".to_qkv." in key:
            for name, part in zip("qkv", _split_heads(value, config["attention_head_dim"]), strict=True):
                result[key.replace(".to_qkv.", f".to_{name}.")] = part
        else:
            result[key] = _linear(value) if ".to_out." in key else value
    return result


def _split_heads(qkv: Tensor, dim_head: int) -> Iterator[Tensor]:
    """One tensor `(heads * 3 * dim_head, ...)`, in this order -> query, key and value, `(C, C)` or `(C,)` each."""
    if len(qkv) % (3 * dim_head):
        raise LoadError(f"attention_head_dim={dim_head} does not divide the {len(qkv) // 3} channels of an attention")
    per_head = qkv.unflatten(0, (-1, 3, dim_head))  # (heads, 3, dim_head, ...)
    return (_linear(part.flatten(0, 1)) for part in per_head.unbind(1))


def _linear(value: Tensor) -> Tensor:
    """Their attention projects with 1x1 convolutions, ours with linear layers: `(C, C, 1[, 1]) -> (C, C)`."""
    return value.flatten(1) if value.ndim > 1 else value


def _vq_modules(config: dict[str, Any]) -> Iterator[Module]:
    levels, layers = len(config["block_out_channels"]), config["layers_per_block"]
    for name in ("quant_conv", "post_quant_conv", "quantize.embedding"):
        yield name, name, _ITSELF
    for half in ("encoder", "decoder"):
        for name, ours in {"conv_in": "conv_in", "norm_out": "conv_norm_out", "conv_out": "conv_out"}.items():
            yield f"{half}.{name}", f"{half}.{ours}", _ITSELF
        yield f"{half}.mid.block_1", f"{half}.mid_block.resnets.0", _RESNET_VQ
        yield f"{half}.mid.attn_1", f"{half}.mid_block.attentions.0", _ATTENTION_VQ
        yield f"{half}.mid.block_2", f"{half}.mid_block.resnets.1", _RESNET_VQ
    for level in range(levels):
        # Theirs counts from the highest resolution in both halves; ours in the order in which blocks are executed.
        sides = (
            (f"encoder.down.{level}", f"encoder.down_blocks.{level}", layers),
            (f"decoder.up.{level}", f"decoder.up_blocks.{levels - 1 - level}", layers + 1),
        )
        for theirs, ours, count in sides:
            for layer in range(count):
                yield f"{theirs}.block.{layer}", f"{ours}.resnets.{layer}", _RESNET_VQ
                yield f"{theirs}.attn.{layer}", f"{ours}.attentions.{layer}", _ATTENTION_VQ
        yield f"encoder.down.{level}.downsample", f"encoder.down_blocks.{level}.downsamplers.0", _CONV
        yield f"decoder.up.{level}.upsample", f"decoder.up_blocks.{levels - 1 - level}.upsamplers.0", _CONV


def _unet_modules(config: dict[str, Any]) -> Iterator[Module]:
    yield "time_embed.0", "time_embedding.linear_1", _ITSELF
    yield "time_embed.2", "time_embedding.linear_2", _ITSELF
    yield "input_blocks.0.0", "conv_in", _ITSELF
    yield "middle_block.0", "mid_block.resnets.0", _RESNET_UNET
    yield "middle_block.1", "mid_block.attentions.0", _ATTENTION_UNET
    yield "middle_block.2", "mid_block.resnets.1", _RESNET_UNET
    yield "out.0", "conv_norm_out", _ITSELF
    yield "out.2", "conv_out", _ITSELF
    # Theirs numbers all layers of one direction in one row, a downsampler being a layer of its own ...
    layers = config["layers_per_block"]
    for level in range(len(config["block_out_channels"])):
        first = 1 + level * (layers + 1)
        for layer in range(layers):
            yield f"input_blocks.{first + layer}.0", f"down_blocks.{level}.resnets.{layer}", _RESNET_UNET
            yield f"input_blocks.{first + layer}.1", f"down_blocks.{level}.attentions.{layer}", _ATTENTION_UNET
        yield f"input_blocks.{first + layers}.0", f"down_blocks.{level}.downsamplers.0", _STRIDED_CONV
    # ... while an upsampler is the last part of a layer, after its attention if there is one.
    for level, kind in enumerate(config["up_block_types"]):
        first = level * (layers + 1)
        for layer in range(layers + 1):
            yield f"output_blocks.{first + layer}.0", f"up_blocks.{level}.resnets.{layer}", _RESNET_UNET
            yield f"output_blocks.{first + layer}.1", f"up_blocks.{level}.attentions.{layer}", _ATTENTION_UNET
        part = 2 if kind.startswith("Attn") else 1
        yield f"output_blocks.{first + layers}.{part}", f"up_blocks.{level}.upsamplers.0", _CONV


def _rename(state: dict[str, Tensor], modules: list[Module], network: str) -> dict[str, Tensor]:
    """Every tensor of `state` under its new name; which of ours are missing is found when they are loaded."""
    names = {
        _join(theirs, part, kind): _join(ours, our_part, kind)
        for theirs, ours, parts in modules
        for part, our_part in parts.items()
        for kind in ("weight", "bias")
    }
    if unknown := sorted(set(state) - set(names)):
        raise LoadError(f"CompVis tensor {unknown[0]!r} has no counterpart in {network} ({len(unknown)} such)")
    return {names[key]: value for key, value in state.items()}


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _check(owner: str, params: dict[str, Any], needed: tuple[str, ...], fixed: dict[str, tuple | None]) -> None:
    for key in needed:
        if key not in params:
            raise LoadError(f"{owner}: the key {key!r} is missing")
    for key, value in params.items():
        if key not in needed and key not in fixed:
            raise LoadError(f"{owner}: {key}={value!r} is not a key that is understood")
        if fixed.get(key) is not None and value not in fixed[key]:
            raise LoadError(f"{owner}: {key}={value!r} is not supported; {' or '.join(map(repr, fixed[key]))} is")

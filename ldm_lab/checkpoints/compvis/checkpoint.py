"""Reads checkpoints of CompVis/latent-diffusion: `model.ckpt` and its config -> configs and tensors of our networks.

Every tensor of a file must belong to a network, describe the noise schedule, or be dropped by a rule below. Any other
tensor is an error.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.serialization import safe_globals

from ldm_lab.checkpoints.compvis import shapes
from ldm_lab.checkpoints.compvis.autoencoder import autoencoder_state
from ldm_lab.checkpoints.compvis.original_config import OriginalConfig
from ldm_lab.checkpoints.compvis.unet import unet_state
from ldm_lab.checkpoints.state_dicts import State, tensors_in, unwrapped
from ldm_lab.diffusion.ddim import DDIMScheduler
from ldm_lab.utils.reading import LoadError, blaming, pickled_names, read_torch
from ldm_lab.utils.terminal import say_once

UNET, EMA, FIRST_STAGE = "model.diffusion_model.", "model_ema.", "first_stage_model."
OF_A_FIRST_STAGE = "encoder.down.0.block.0."  # prefix that identifies a checkpoint of a first stage alone

# In the checkpoint of a first stage: LPIPS and the discriminator.
_LOSS = "loss."
# `logvar` weights the training loss; the others count steps or follow from the betas.
_LEFT_OUT = {"logvar", "lvlb_weights", "model_ema.decay", "model_ema.num_updates"}
_NOISE = {
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
}
_SCALE = "scale_factor"
_CONDITIONAL = ("cond_stage_model.", UNET + "label_emb.")
_CROSS_ATTENTION = ".transformer_blocks."


class Part(NamedTuple):
    """A network, or a scheduler (no tensors), as plain data under our names."""

    config: dict[str, Any]  # `_class_name` names the class
    tensors: State


def is_checkpoint(path: str | Path) -> bool:
    """Whether a file holds CompVis tensors, by their names; the tensors stay on disk if possible."""
    try:
        names = read_state(path, mmap=True)
    except LoadError:
        return False
    return any(name.startswith((UNET, FIRST_STAGE, OF_A_FIRST_STAGE)) for name in names)


def read(path: str | Path, original_config: str | Path | None = None, use_ema: bool = True) -> dict[str, Part]:
    """The parts of a checkpoint: `vqvae`, and for stage 2 also `unet` and a `scheduler` with CompVis's steps.

    Args:
        path: the checkpoint.
        original_config: its YAML file, which describes the architecture. None: a `config.yaml`, or a YAML file with
            the checkpoint's name, beside the checkpoint; without such a file, the shapes of the tensors.
        use_ema: use the moving average of the UNet's weights instead of the raw weights.

    Raises:
        LoadError: a file is missing or corrupt, the model is conditional or has no first stage, or a tensor is left
            over or cannot be translated; the one-line message names it.
    """
    state = read_state(path)
    if not any(key.startswith(UNET) for key in state) and any(key.startswith(OF_A_FIRST_STAGE) for key in state):
        return {"vqvae": read_first_stage(path, original_config)}
    parts = _separate(state, path)
    config = _config(path, original_config, parts)
    weights = _averaged(parts, path) if use_ema else parts[UNET]
    unet = config.unet()
    with blaming(path):
        unet = Part({"_class_name": "UNet2DModel", **unet}, unet_state(weights, unet))
    return {
        "vqvae": _first_stage(parts[FIRST_STAGE], config, path, scaling_factor=_scale(parts[""], config, path)),
        "unet": unet,
        "scheduler": Part(_scheduler(parts[""], config, path).to_json(), {}),
    }


def read_first_stage(path: str | Path, original_config: str | Path | None = None) -> Part:
    """The autoencoder of a checkpoint; its `scaling_factor` is 1.

    Args:
        path: a checkpoint of a first stage, or of stage 2, which includes its first stage.
        original_config: the YAML file of the checkpoint; None as in `read`.

    Raises:
        LoadError: as `read`.
    """
    state = read_state(path)
    if any(key.startswith(UNET) for key in state):
        tensors = _separate(state, path)[FIRST_STAGE]
    else:
        tensors = {key: value for key, value in state.items() if not key.startswith(_LOSS)}
    return _first_stage(tensors, _config(path, original_config, {FIRST_STAGE: tensors}), path)


def read_state(path: str | Path, mmap: bool = False) -> State:
    """The tensors of a checkpoint, on the CPU; nothing in the file is executed or imported.

    They are in `state_dict`, below another usual key, or at the top of the file; safetensors files work too. Old
    Lightning versions keyed callback states by their classes. Only such a class is read, as an empty class of this
    module.

    Raises:
        LoadError: the file is missing, corrupt, or holds anything but tensors and plain data.
    """
    path = Path(path)
    if not path.is_file():
        raise LoadError(f"{path}: no such file")
    names = (name.replace(" ", ".") for name in pickled_names(path))
    callbacks = [name for name in names if name.startswith("pytorch_lightning.callbacks.")]
    with safe_globals([(_Callback, name) for name in callbacks]):
        content = read_torch(path, mmap)
    state = tensors_in(content)
    if state is None:
        raise LoadError(f"{path}: not a checkpoint of CompVis: there is no state_dict of tensors")
    with blaming(path):
        return unwrapped(state)


class _Callback:
    """Placeholder for the class of a callback."""


def _separate(state: State, path: str | Path) -> dict[str, State]:
    """Group the tensors by prefix and strip it; tensors of the noise schedule have no prefix."""
    parts: dict[str, State] = {UNET: {}, EMA: {}, FIRST_STAGE: {}, "": {}}
    for key, value in state.items():
        if key.startswith(_CONDITIONAL) or _CROSS_ATTENTION in key:
            raise LoadError(f"{path}: a conditional model (it holds {key!r}), only unconditional ones are supported")
        if key not in _LEFT_OUT:
            prefix = next(prefix for prefix in parts if key.startswith(prefix))
            parts[prefix][key.removeprefix(prefix)] = value
    for prefix, name in ((UNET, "UNet"), (FIRST_STAGE, "first stage")):
        if not parts[prefix]:
            raise LoadError(f"{path}: not a latent diffusion model: it holds no {name} ({prefix}*)")
    if unexpected := sorted(set(parts[""]) - _NOISE - {_SCALE}):
        raise LoadError(f"{path}: there is no place for {unexpected[0]!r} ({len(unexpected)} left over)")
    return parts


def _averaged(state: dict[str, State], path: str | Path) -> State:
    """The moving average under the names of the raw weights; CompVis's EMA drops the dots from names."""
    average = {name.replace("_orig_mod", ""): value for name, value in state[EMA].items()}  # prefix of torch.compile
    if not average:
        raise LoadError(f"{path}: holds no moving average ({EMA}*): use_ema=False takes the weights themselves")
    names = {("diffusion_model." + name).replace(".", ""): name for name in state[UNET]}
    if missing := sorted(set(names) - set(average)):
        raise LoadError(f"{path}: no tensor {EMA + missing[0]!r} ({len(missing)} missing)")
    if unexpected := sorted(set(average) - set(names)):
        raise LoadError(f"{path}: there is no place for {EMA + unexpected[0]!r} ({len(unexpected)} left over)")
    return {name: average[flat] for flat, name in names.items()}


def _config(path: str | Path, original_config: str | Path | None, parts: dict[str, State]) -> OriginalConfig:
    """The given config, else the config beside the checkpoint, else a config from the tensors' shapes."""
    if original_config is not None:
        return OriginalConfig.read(original_config)
    for beside in (Path(path).with_suffix(".yaml"), Path(path).with_name("config.yaml")):
        if beside.is_file() and (config := OriginalConfig.read(beside)).is_one:
            say_once(f"{path}: its architecture is that of {beside}")
            return config
    with blaming(path):
        return OriginalConfig({"model": _read_off(path, parts)}, path)


def _read_off(path: str | Path, parts: dict[str, State]) -> dict[str, Any]:
    autoencoder = shapes.first_stage(parts[FIRST_STAGE])
    if UNET not in parts:
        return autoencoder
    if "betas" not in parts[""]:
        raise LoadError("holds no betas: give its YAML file as original_config=")
    halvings = len(autoencoder["params"]["ddconfig"]["ch_mult"]) - 1
    unet = shapes.unet(parts[UNET], image_size=shapes.RESOLUTION // 2**halvings)
    heads = ", ".join(f"{key}={unet[key]}" for key in ("num_head_channels", "num_heads") if key in unet)
    say_once(
        f"{path}: without a YAML file (original_config=), its tensors leave open and these are assumed: {heads},"
        f" images of {shapes.RESOLUTION} pixels" + ("" if _SCALE in parts[""] else ", scale_factor=1")
    )
    betas = parts[""]["betas"].flatten()
    ends = {"linear_start": f"{betas[0]:.6g}", "linear_end": f"{betas[-1]:.6g}", "timesteps": len(betas)}
    return {"params": {**ends, "unet_config": {"params": unet}, "first_stage_config": autoencoder}}


def _scale(buffers: State, config: OriginalConfig, path: str | Path) -> float:
    if _SCALE not in buffers:
        return config.scale_factor()
    if buffers[_SCALE].numel() != 1:
        raise LoadError(f"{path}: {_SCALE} has shape {tuple(buffers[_SCALE].shape)}, must be one number")
    return buffers[_SCALE].item()


def _first_stage(
    state: State,
    config: OriginalConfig,
    path: str | Path,
    **settings: Any,  # noqa: ANN401
) -> Part:
    kind, arguments = config.first_stage()
    with blaming(path):
        return Part({"_class_name": kind.class_name, **arguments, **settings}, autoencoder_state(state, arguments))


def _scheduler(noise: State, config: OriginalConfig, path: str | Path) -> DDIMScheduler:
    """CompVis's DDIM with the betas of the file; betas that differ from the config are listed one by one."""
    settings = {
        **config.noise(),
        "prediction_type": config.prediction_type(),
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    }
    with blaming(config.path):
        scheduler = DDIMScheduler(**settings)
    betas = noise.get("betas", scheduler.betas).float()
    if betas.shape == scheduler.betas.shape and torch.allclose(betas, scheduler.betas, rtol=1e-6, atol=0):
        return scheduler
    with blaming(path):
        return DDIMScheduler(**{**settings, "num_train_timesteps": betas.numel(), "trained_betas": betas.tolist()})

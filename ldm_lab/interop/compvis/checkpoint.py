"""Checkpoints of CompVis/latent-diffusion: a `model.ckpt` and its config -> our networks and scheduler.

Every tensor of a file is accounted for: it belongs to a network, describes the noise, or is left out by one of the
rules below. Anything else is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from ldm_lab.diffusion.ddim import DDIMScheduler
from ldm_lab.interop.compvis.original_config import OriginalConfig
from ldm_lab.interop.compvis.translate import blaming
from ldm_lab.interop.compvis.unet import unet_state
from ldm_lab.models.first_stage import FirstStage
from ldm_lab.models.unet import UNet2DModel
from ldm_lab.serialization import LoadError, PretrainedModel, read_torch

UNET, EMA, FIRST_STAGE = "model.diffusion_model.", "model_ema.", "first_stage_model."

# Of a first stage's own checkpoint: LPIPS and the discriminator.
_LOSS = "loss."
# `logvar` weights the loss of training, the others count its steps or follow from the betas.
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


def load_pipeline(
    path: str | Path, original_config: str | Path | None, use_ema: bool = True
) -> dict[str, PretrainedModel | DDIMScheduler]:
    """The parts of a pipeline: `vqvae`, `unet` (both in evaluation mode) and a `scheduler` that steps as CompVis's.

    Args:
        path: the checkpoint.
        original_config: its YAML file, which describes the architecture.
        use_ema: take the moving average of the UNet's weights, not the weights themselves.

    Raises:
        LoadError: a file is missing or damaged, the model is conditional or has no first stage, or a tensor is
            missing, left over or of another shape; one line says which.
    """
    state = _separate(read_state(path), path)
    config = _read_config(path, original_config)
    unet = config.unet()
    weights = _averaged(state, path) if use_ema else state[UNET]
    return {
        "vqvae": _first_stage(state[FIRST_STAGE], config, path, scaling_factor=_scale(state[""], config, path)),
        "unet": _build(UNet2DModel, unet, unet_state, weights, path),
        "scheduler": _scheduler(state[""], config, path),
    }


def load_first_stage(path: str | Path, original_config: str | Path | None) -> FirstStage:
    """The autoencoder of a checkpoint, in evaluation mode; its `scaling_factor` is 1.

    Args:
        path: a checkpoint of a first stage, or one of stage 2, which holds its first stage.
        original_config: the YAML file of either.

    Raises:
        LoadError: as `load_pipeline`.
    """
    state = read_state(path)
    if any(key.startswith(UNET) for key in state):
        own = _separate(state, path)[FIRST_STAGE]
    else:
        own = {key: value for key, value in state.items() if not key.startswith(_LOSS)}
    return _first_stage(own, _read_config(path, original_config), path)


def read_state(path: str | Path) -> dict[str, Tensor]:
    """The `state_dict` of a checkpoint, on the CPU; nothing that the file holds is run or imported.

    Lightning of that time kept the state of its callbacks by their class. Such a class, and no other, is read as an
    empty one of ours.

    Raises:
        LoadError: the file is missing, damaged, or holds other things than tensors and plain data.
    """
    path = Path(path)
    if not path.is_file():
        raise LoadError(f"{path}: no such file")
    with safe_globals([(_Callback, name) for name in _callbacks(path)]):
        content = read_torch(path)
    state = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    ):
        raise LoadError(f"{path}: not a checkpoint of CompVis: there is no state_dict of tensors")
    return state


class _Callback:
    """Stands for the class of a callback."""


def _callbacks(path: Path) -> list[str]:
    try:
        names = get_unsafe_globals_in_checkpoint(path)
    except Exception:  # a damaged file; what is wrong with it, `read_torch` says
        return []
    return [name for name in names if name.startswith("pytorch_lightning.callbacks.")]


def _separate(state: dict[str, Tensor], path: str | Path) -> dict[str, dict[str, Tensor]]:
    """The tensors by prefix, which their names lose; those of the noise have none."""
    parts: dict[str, dict[str, Tensor]] = {UNET: {}, EMA: {}, FIRST_STAGE: {}, "": {}}
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


def _averaged(state: dict[str, dict[str, Tensor]], path: str | Path) -> dict[str, Tensor]:
    """The moving average under the names of the weights that it follows; its own have lost their dots."""
    average = state[EMA]
    if not average:
        raise LoadError(f"{path}: holds no moving average ({EMA}*): use_ema=False takes the weights themselves")
    names = {("diffusion_model." + name).replace(".", ""): name for name in state[UNET]}
    if missing := sorted(set(names) - set(average)):
        raise LoadError(f"{path}: no tensor {EMA + missing[0]!r} ({len(missing)} missing)")
    if unexpected := sorted(set(average) - set(names)):
        raise LoadError(f"{path}: there is no place for {EMA + unexpected[0]!r} ({len(unexpected)} left over)")
    return {name: average[flat] for flat, name in names.items()}


def _read_config(path: str | Path, original_config: str | Path | None) -> OriginalConfig:
    if original_config is None:
        raise LoadError(f"{path}: does not describe its architecture: give its YAML file as original_config=")
    return OriginalConfig(original_config)


def _scale(buffers: dict[str, Tensor], config: OriginalConfig, path: str | Path) -> float:
    if _SCALE not in buffers:
        return config.scale_factor()
    if buffers[_SCALE].numel() != 1:
        raise LoadError(f"{path}: {_SCALE} has shape {tuple(buffers[_SCALE].shape)}, must be one number")
    return buffers[_SCALE].item()


def _first_stage(
    state: dict[str, Tensor],
    config: OriginalConfig,
    path: str | Path,
    **settings: Any,  # noqa: ANN401
) -> FirstStage:
    kind, arguments = config.first_stage()
    arguments = {**arguments, **settings}
    return _build(kind.model, arguments, kind.state, state, path)


def _build(
    kind: type[PretrainedModel],
    config: dict[str, Any],
    translate: Callable[[dict[str, Tensor], dict[str, Any]], dict[str, Tensor]],
    state: dict[str, Tensor],
    path: str | Path,
) -> PretrainedModel:
    with blaming(path):
        with torch.device("meta"):
            model = kind.from_config(config)
        state = translate(state, config)
    model.load_weights(state, origin=str(path), assign=True)
    return model.eval()


def _scheduler(noise: dict[str, Tensor], config: OriginalConfig, path: str | Path) -> DDIMScheduler:
    """DDIM as theirs. The betas are those of the file: where the config says others, they are listed one by one."""
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

"""Loads the guide of autoguidance, and checks that it denoises the same latents as the model."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ldm_lab.checkpoints import locate
from ldm_lab.checkpoints.checkpoint import fingerprint
from ldm_lab.diffusion.guidance import Converted, Guidance, require_same_latents
from ldm_lab.diffusion.scheduler import Scheduler
from ldm_lab.pipeline import LDMPipeline
from ldm_lab.utils.errors import UserError

ADVICE = "take a guide of the same first stage and noise schedule, such as a snapshot of the run"


def attach(pipe: LDMPipeline, source: str, plugins: Sequence[str] = ()) -> str:
    """Give a pipeline the UNet of another model as its guide.

    A guide of another prediction type is converted.

    Args:
        pipe: the model; its `guide` is set.
        source: the guide, anything that `checkpoints.locate.find` takes.
        plugins: packages whose classes the guide may name.

    Returns:
        The fingerprint of the guide's weights.

    Raises:
        LoadError: there is no such model, or it is corrupt.
        UserError: the guide has another autoencoder, latent scale, noise schedule, or shape of latents.
    """
    other = LDMPipeline.from_file_or_folder(locate.find(source).path, plugins=plugins)
    try:
        require_same_latents(pipe.unet, other.unet)
        _require_same_process(pipe, other)
        same = other.scheduler.config.get("prediction_type") == pipe.scheduler.config.get("prediction_type")
        target = pipe.scheduler.parameterization
        pipe.guide = other.unet if same else Converted(other.unet, other.scheduler, target)
    except UserError as error:
        raise UserError(f"guide={source}: {error}") from error
    return fingerprint(other.unet)


def evaluations(pipe: LDMPipeline, steps: int, guidance: Guidance) -> dict[str, int]:
    """Evaluations of the UNet and of the guide for each sample. Raises `UserError` for too many steps."""
    pipe.scheduler.set_timesteps(steps)
    return {"unet": len(pipe.scheduler.timesteps), "guide": guidance.evaluations(pipe.scheduler)}


def _require_same_process(pipe: LDMPipeline, other: LDMPipeline) -> None:
    """Raise `UserError` unless both models noise the same latents in the same way."""
    if other.vqvae.encoding != pipe.vqvae.encoding:
        raise UserError(f"was trained on the latents of another autoencoder: {ADVICE}")
    scales = [model.vqvae.config.scaling_factor for model in (other, pipe)]
    if not math.isclose(*scales, rel_tol=1e-6):
        raise UserError(f"was trained with scaling_factor={scales[0]:.6g}, the model with {scales[1]:.6g}: {ADVICE}")
    betas = [isinstance(model.scheduler, Scheduler) for model in (other, pipe)]  # or a straight path: flow matching
    if betas[0] != betas[1]:
        raise UserError(f"was trained with another process (betas or flow matching): {ADVICE}")
    lengths = [len(model.scheduler) for model in (other, pipe)]
    if lengths[0] != lengths[1]:
        raise UserError(f"has num_train_timesteps={lengths[0]}, the model {lengths[1]}: {ADVICE}")
    if all(betas) and not _same_levels(other.scheduler, pipe.scheduler):
        raise UserError(f"was trained with other betas, so that alphas_cumprod differs: {ADVICE}")


def _same_levels(one: Scheduler, other: Scheduler) -> bool:
    return torch.allclose(one.alphas_cumprod, other.alphas_cumprod, rtol=1e-5, atol=1e-8)

"""Checks before training that the networks fit together, on the meta device: no memory, no side effects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ldm_lab.data.transforms import parse_size
from ldm_lab.diffusion.ddim import DDIMScheduler
from ldm_lab.diffusion.process import Process
from ldm_lab.diffusion.samplers import require_process
from ldm_lab.models.first_stage import FirstStage
from ldm_lab.models.unet import UNet2DModel
from ldm_lab.pipeline import LDMPipeline
from ldm_lab.runs.folder import RunFolder
from ldm_lab.utils.errors import UserError


def check_fit(image_size: int | Sequence[int], autoencoder: FirstStage, unet: UNet2DModel | None = None) -> None:
    """Pass an image through copies of these networks on the meta device.

    Raises:
        UserError: the image size or the channels of the latents do not fit.
    """
    size = parse_size(image_size)
    with torch.device("meta"):
        autoencoder = type(autoencoder).from_config(autoencoder.config)
        if unet is not None:
            unet = type(unet).from_config(unet.config)
            LDMPipeline(autoencoder, unet, DDIMScheduler())  # raises if the networks do not fit
        try:
            latents = autoencoder.latents(torch.empty(1, autoencoder.config.in_channels, *size))
            if unet is not None:
                unet(latents, torch.zeros(1))
        except ValueError as error:
            factor = autoencoder.downsample_factor * getattr(unet, "downsample_factor", 1)
            near = [max(factor, round(side / factor) * factor) for side in size]
            advice = f"sides must be multiples of {factor}, e.g. {near[0] if near[0] == near[1] else near}"
            raise UserError(f"data.image_size={image_size} does not fit the networks: {error}; {advice}") from error


def require_same_channels(name: str, autoencoder: FirstStage, channels: int) -> None:
    """Raise `UserError` unless the first stage `autoencoder=name` is for images of so many channels."""
    taken = autoencoder.config.in_channels
    if taken != channels:
        raise UserError(
            f"autoencoder={name}: is for images of {taken} channel(s), and those here have {channels} (data.channels):"
            " train one on these images"
        )


def check_samplers(callbacks: Mapping[str, Any], scheduler: Process) -> None:
    """Check that the samplers of callbacks fit the process that the model learns.

    Args:
        callbacks: the group `callbacks` of a config.
        scheduler: the scheduler of the model.

    Raises:
        UserError: a sampler is for another process; the message names its key.
    """
    for name, settings in callbacks.items():
        if (settings or {}).get("_target_") and (sampler := settings.get("sampler")):
            try:
                require_process(sampler, scheduler)
            except UserError as error:
                raise UserError(f"callbacks.{name}.{error}") from error


def check_order(stages: Sequence[RunFolder], lengths: Sequence[int]) -> None:
    """Refuse to train stage 1 further once stage 2 has begun, as the UNet is trained on the old latents.

    Raises:
        UserError: stage 1 is not finished at this length, and a later stage has a checkpoint or result.
    """
    first, *later = stages
    for stage in later:
        state = first.status()
        if stage.has_state() and not (state.get("finished") and state["max_images"] == lengths[0]):
            raise UserError(
                f"max_images={lengths[0]} would train {first.folder} on from {state.get('max_images', 0)}, but"
                f" {stage.folder} is trained on it as it is: lengthen stage 2 alone, experiment=.../diffusion,"
                " or choose another name="
            )

"""Whether the networks of a recipe fit its images: tried without memory, before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ldm_lab.data.transforms import parse_size
from ldm_lab.diffusion.ddim import DDIMScheduler
from ldm_lab.models.unet import UNet2DModel
from ldm_lab.models.vq_model import VQModel
from ldm_lab.pipeline import LDMPipeline


def check_fit(image_size: int | Sequence[int], autoencoder: VQModel, unet: UNet2DModel | None = None) -> None:
    """Pass an image through networks on the meta device.

    Raises:
        ValueError: its size, or the channels of the latents, do not fit.
    """
    if unet is not None:
        LDMPipeline(autoencoder, unet, DDIMScheduler())  # refuses networks that do not fit each other
    with torch.device("meta"):
        images = torch.empty(1, autoencoder.config.in_channels, *parse_size(image_size))
        try:
            latents = autoencoder.encode(images).latents
            if unet is not None:
                unet(latents, torch.zeros(1))
        except ValueError as error:
            raise ValueError(f"data.image_size={image_size} does not fit the networks: {error}") from error

"""Return types of networks."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ldm_lab.models.gaussian import DiagonalGaussian
from ldm_lab.utils.outputs import BaseOutput


@dataclass
class EncoderOutput(BaseOutput):
    """Latents `(B, C, h, w)`, neither quantized nor scaled."""

    latents: Tensor


@dataclass
class AutoencoderKLOutput(BaseOutput):
    """The posterior of the latents, a Gaussian of mean and variance `(B, C, h, w)`, not scaled."""

    latent_dist: DiagonalGaussian


@dataclass
class DecoderOutput(BaseOutput):
    """Images `(B, C, H, W)`, about in [-1, 1], and the quantizer's loss (0-dim) if there is a quantizer."""

    sample: Tensor
    commit_loss: Tensor | None = None


@dataclass
class UNet2DOutput(BaseOutput):
    """Prediction of the UNet, in the shape of its input: noise, clean latents or velocity, as trained."""

    sample: Tensor

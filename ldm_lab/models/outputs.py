"""What networks return."""

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
    """The distribution of the latents, a Gaussian of mean and variance `(B, C, h, w)`, not scaled."""

    latent_dist: DiagonalGaussian


@dataclass
class DecoderOutput(BaseOutput):
    """Images `(B, C, H, W)`, about in [-1, 1], and the loss of the quantizer (0-dim) where there is one."""

    sample: Tensor
    commit_loss: Tensor | None = None


@dataclass
class UNet2DOutput(BaseOutput):
    """What the UNet predicts, in the shape of its input: noise, clean latents or velocity, as it was trained."""

    sample: Tensor

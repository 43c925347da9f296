"""Return types of networks and pipelines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ldm_lab.utils.outputs import BaseOutput

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

LOG_VARIANCE = (-30.0, 20.0)  # beyond these limits the variance is useless in float32


class DiagonalGaussian:
    """The posterior of a KL autoencoder: an independent Gaussian for each entry of the latents.

    Kingma & Welling 2014, "Auto-Encoding Variational Bayes", arXiv 1312.6114.

    Args:
        moments: means, then log variances: `(B, 2C, h, w)`.

    Attributes:
        mean: `(B, C, h, w)`.
        logvar: log variance, clamped to [-30, 20]; `(B, C, h, w)`.
        std: standard deviation, `(B, C, h, w)`.
        var: variance, `(B, C, h, w)`.
    """

    def __init__(self, moments: Tensor) -> None:
        self.mean, logvar = moments.chunk(2, dim=1)  # (B, 2C, h, w) -> (B, C, h, w) each
        self.logvar = logvar.clamp(*LOG_VARIANCE)
        self.std = torch.exp(0.5 * self.logvar)
        self.var = torch.exp(self.logvar)

    def mode(self) -> Tensor:
        """The mode, which is the mean."""
        return self.mean

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw latents; the generator may be on another device."""
        device = self.mean.device if generator is None else generator.device
        noise = torch.randn(self.mean.shape, generator=generator, device=device, dtype=self.mean.dtype)
        return self.from_noise(noise)

    def from_noise(self, noise: Tensor) -> Tensor:
        """The draw for standard normal `noise` `(B, C, h, w)`: `mean + std * noise`."""
        return self.mean + self.std * noise.to(self.mean)

    def kl(self) -> Tensor:
        """KL divergence from N(0, 1), in nats, summed over C, h and w: `(B,)`, float32 (appendix B of the paper)."""
        mean, logvar = self.mean.float(), self.logvar.float()
        return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum((1, 2, 3))


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


@dataclass
class ImagePipelineOutput(BaseOutput):
    """Result of a pipeline call.

    Attributes:
        images: by `output_type`, a list of B PIL images; an array `(B, H, W, C)` in [0, 1]; a tensor
            `(B, C, H, W)` in [0, 1]; or the scaled latents `(B, c, h, w)`.
    """

    images: list[Image.Image] | np.ndarray | Tensor

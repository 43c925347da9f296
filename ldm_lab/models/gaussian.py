"""Posterior distribution of a KL autoencoder (Kingma & Welling 2014, arXiv 1312.6114)."""

from __future__ import annotations

import torch
from torch import Tensor

LOG_VARIANCE = (-30.0, 20.0)  # beyond these limits the variance is useless in float32


class DiagonalGaussian:
    """An independent Gaussian for each entry of the latents.

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

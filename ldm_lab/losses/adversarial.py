"""Adversarial losses of autoencoder and patch discriminator (Esser et al. 2021, VQGAN, arXiv 2012.09841, §3.1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm_lab.utils.limits import NonNegative, Whole


def generator_hinge(logits_fake: Tensor) -> Tensor:
    """Hinge loss of the generator, -E[D(x̂)] (Lim & Ye 2017, arXiv 1705.02894); float32, 0-dim."""
    return -logits_fake.float().mean()


def discriminator_hinge(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """Hinge loss of the discriminator, ½ (E[relu(1 - D(x))] + E[relu(1 + D(x̂))]); float32, 0-dim."""
    return 0.5 * (F.relu(1 - logits_real.float()).mean() + F.relu(1 + logits_fake.float()).mean())


def adaptive_weight(nll: Tensor, generator: Tensor, last_layer: Tensor, max_weight: float = 1e4) -> Tensor:
    """|∇nll| / (|∇generator| + 1e-4), clamped to [0, max_weight] (arXiv 2012.09841, Eq. 7): balances both gradients.

    Args:
        nll: reconstruction loss, 0-dim.
        generator: the generator's adversarial loss, 0-dim.
        last_layer: weight of the decoder's last layer; gradients are with respect to it.
        max_weight: upper end of the clamp.

    Returns:
        0-dim, detached; zero without gradients (in validation).
    """
    if not generator.requires_grad:
        return torch.zeros_like(generator)
    (nll_gradient,) = torch.autograd.grad(nll, last_layer, retain_graph=True)
    (generator_gradient,) = torch.autograd.grad(generator, last_layer, retain_graph=True)
    return (nll_gradient.norm() / (generator_gradient.norm() + 1e-4)).clamp(0, max_weight).detach()


@dataclass(frozen=True)
class AdversarialTerm:
    """Start, ramp and weight of the adversarial terms, in training images.

    Attributes:
        weight: multiplies the adaptive weight after the clamp.
        start_images: images after which the discriminator trains and the generator term counts.
        ramp_images: images over which the generator term then grows linearly from 0; 0 switches it on at
            once, as in latent diffusion. The discriminator trains at full strength from the start.
        max_weight: maximum of the adaptive weight.
    """

    weight: NonNegative = 0.75
    start_images: Whole = 0
    ramp_images: Whole = 0
    max_weight: NonNegative = 1e4

    def discriminator_factor(self, images_seen: int) -> float:
        """Factor of the discriminator's loss: 0 before the start, then 1."""
        return float(images_seen >= self.start_images)

    def generator_factor(self, images_seen: int) -> float:
        """Factor of the generator's loss, in [0, 1]."""
        if not self.ramp_images:
            return self.discriminator_factor(images_seen)
        return min(max((images_seen - self.start_images) / self.ramp_images, 0.0), 1.0)

"""The loss of the first stage: pixels, perception, codebook and, where there is one, the discriminator."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ldm_lab.losses.adversarial import AdversarialTerm, adaptive_weight, discriminator_hinge, generator_hinge
from ldm_lab.losses.perceptual import PerceptualDistance


class AutoencoderLossOutput(NamedTuple):
    """What one batch costs.

    Attributes:
        total: the sum to minimise, 0-dim, float32; one backward gives both players their gradients.
        terms: its parts for logging, 0-dim, detached. `rec`, `perceptual`, `codebook` before their weights,
            `nll` = rec + weighted perceptual; with a discriminator also `generator` (before weight and
            factor), `discriminator` (with factor), `d_weight`, `factor` (of the generator term),
            `logits_real` and `logits_fake` (means over the discriminator's batch).
    """

    total: Tensor
    terms: dict[str, Tensor]


class AutoencoderLoss(nn.Module):
    """Loss of a VQ autoencoder (Rombach et al. 2022, arXiv 2112.10752, Eq. 25; Esser et al. 2021, Eq. 6).

        nll   = mean|x - x̂| + perceptual_weight · mean LPIPS(x̂, x)
        total = nll + codebook_weight · codebook + factor · d_weight · generator + discriminator

    Two players share one step: the generator term sees the discriminator with detached parameters, the
    discriminator term sees the detached reconstruction. One forward of the autoencoder, one backward and
    one optimizer with two parameter groups therefore train both. Every parameter of the discriminator has
    a gradient on every step, zero before the start, so DDP need not look for unused ones.

    Args:
        perceptual: distance per image, `LPIPS` or `MultiScaleL1`.
        discriminator: images -> logits, `PatchDiscriminator`; `None` leaves the adversarial terms out.
        adversarial: start, ramp and weight of the discriminator; unused without one.
        pixel: mean distance of pixels, `(reconstruction, target) -> 0-dim`.
        perceptual_weight: weight of the perceptual distance.
        codebook_weight: weight of the codebook loss.
    """

    def __init__(
        self,
        perceptual: PerceptualDistance,
        discriminator: nn.Module | None = None,
        adversarial: AdversarialTerm | None = None,
        pixel: Callable[[Tensor, Tensor], Tensor] = F.l1_loss,
        perceptual_weight: float = 1.0,
        codebook_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.perceptual = perceptual
        self.discriminator = discriminator
        self.adversarial = adversarial or AdversarialTerm()
        self.pixel = pixel
        self.perceptual_weight = perceptual_weight
        self.codebook_weight = codebook_weight

    def forward(
        self, target: Tensor, reconstruction: Tensor, codebook_loss: Tensor, last_layer: Tensor, images_seen: int
    ) -> AutoencoderLossOutput:
        """The loss of one batch; float32 under autocast too.

        Args:
            target: images `(B, 3, H, W)` in [-1, 1].
            reconstruction: what the decoder made of them, of the same shape.
            codebook_loss: the quantizer's loss, 0-dim.
            last_layer: `decoder.conv_out.weight`, for the adaptive weight.
            images_seen: training images before this batch, over all ranks.
        """
        target, reconstruction = target.float(), reconstruction.float()
        rec, perceptual, nll = self._reconstruction(target, reconstruction)
        total = nll + self.codebook_weight * codebook_loss
        terms = {"rec": rec, "perceptual": perceptual, "nll": nll, "codebook": codebook_loss}
        if self.discriminator is not None:
            generator, generator_terms = self._generator(reconstruction, nll, last_layer, images_seen)
            discriminator, discriminator_terms = self._discriminator(target, reconstruction.detach(), images_seen)
            total = total + generator + discriminator
            terms |= generator_terms | discriminator_terms
        return AutoencoderLossOutput(total, {name: term.detach() for name, term in terms.items()})

    def reconstruction_loss(self, target: Tensor, reconstruction: Tensor) -> Tensor:
        """`nll` alone, for images `(B, 3, H, W)` in [-1, 1] that have no adversary: 0-dim, float32."""
        return self._reconstruction(target.float(), reconstruction.float())[2]

    def _reconstruction(self, target: Tensor, reconstruction: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Distance of pixels, perceptual distance, and their weighted sum."""
        rec = self.pixel(reconstruction, target)
        perceptual = self.perceptual(reconstruction, target).mean()
        return rec, perceptual, rec + self.perceptual_weight * perceptual

    def _generator(
        self, reconstruction: Tensor, nll: Tensor, last_layer: Tensor, images_seen: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted generator term: gradients reach the autoencoder alone."""
        frozen = {name: parameter.detach() for name, parameter in self.discriminator.named_parameters()}
        loss = generator_hinge(functional_call(self.discriminator, frozen, (reconstruction,)))
        weight = self.adversarial.weight * adaptive_weight(nll, loss, last_layer, self.adversarial.max_weight)
        factor = loss.new_tensor(self.adversarial.generator_factor(images_seen))
        return factor * weight * loss, {"generator": loss, "d_weight": weight, "factor": factor}

    def _discriminator(self, real: Tensor, fake: Tensor, images_seen: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The discriminator's term: gradients reach the discriminator alone."""
        # One call each: the running statistics of BatchNorm see real and reconstructed images apart.
        logits_real, logits_fake = self.discriminator(real), self.discriminator(fake)
        loss = self.adversarial.discriminator_factor(images_seen) * discriminator_hinge(logits_real, logits_fake)
        means = {"logits_real": logits_real.float().mean(), "logits_fake": logits_fake.float().mean()}
        return loss, {"discriminator": loss, **means}

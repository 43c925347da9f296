"""Loss of the first stage: pixel, perceptual and latent terms, and an optional discriminator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ldm_lab.losses.adversarial import AdversarialTerm, adaptive_weight, discriminator_hinge, generator_hinge
from ldm_lab.losses.perceptual import PerceptualDistance
from ldm_lab.utils.arguments import require
from ldm_lab.utils.limits import NonNegative


class AutoencoderLossOutput(NamedTuple):
    """Loss of one batch.

    Attributes:
        total: the sum to minimise, 0-dim, float32; one backward pass computes all gradients.
        terms: its parts for logging, 0-dim, detached. `rec`, `perceptual` and `codebook` or `kl` are before
            their weights, `nll` = rec + weighted perceptual; with a discriminator also `generator` (before
            weight and factor), `discriminator` (with factor), `d_weight`, `factor` (of the generator term),
            `logits_real` and `logits_fake` (means over the discriminator's batch).
    """

    total: Tensor
    terms: dict[str, Tensor]


class FirstStageLoss(nn.Module):
    """Base class of both losses (Rombach et al. 2022, arXiv 2112.10752, Eq. 25; Esser et al. 2021, Eq. 6).

        nll   = mean|x - x̂| + perceptual_weight · mean LPIPS(x̂, x)
        total = scale · nll + weight · penalty + factor · d_weight · generator + discriminator

    Subclasses define scale and penalty: see `AutoencoderLoss` and `KLAutoencoderLoss`.

    Both networks train in one step: the generator term uses the discriminator with detached parameters, the
    discriminator term uses the detached reconstruction. So one forward pass of the autoencoder, one backward
    pass and one optimizer with two parameter groups suffice. Every parameter of the discriminator has a
    gradient in every step, zero before the start, so DDP need not search for unused parameters.

    Args:
        perceptual: distance per image, `LPIPS` or `MultiScaleL1`.
        discriminator: images -> logits, `PatchDiscriminator`; `None`: no adversarial terms.
        adversarial: start, ramp and weight of the adversarial terms; unused without a discriminator.
        pixel: mean pixel distance, `(reconstruction, target) -> 0-dim`.
        perceptual_weight: weight of the perceptual distance.
        penalty_weight: weight of what is asked of the latents.

    Raises:
        UserError: `perceptual_weight` is negative.
    """

    penalty: ClassVar[str]  # name of the penalty in the terms

    def __init__(
        self,
        perceptual: PerceptualDistance,
        discriminator: nn.Module | None = None,
        adversarial: AdversarialTerm | None = None,
        pixel: Callable[[Tensor, Tensor], Tensor] = F.l1_loss,
        perceptual_weight: float = 1.0,
        penalty_weight: float = 1.0,
    ) -> None:
        super().__init__()
        require(perceptual_weight >= 0, "perceptual_weight", perceptual_weight, "at least 0")
        self.perceptual = perceptual
        self.discriminator = discriminator
        self.adversarial = adversarial or AdversarialTerm()
        self.pixel = pixel
        self.perceptual_weight = perceptual_weight
        self.penalty_weight = penalty_weight

    @property
    def smallest_side(self) -> int:
        """Least height and width of images, for the perceptual distance and the discriminator."""
        return max(getattr(part, "smallest_side", 1) for part in (self.perceptual, self.discriminator))

    def scale(self, images: Tensor) -> int:
        """Factor of `nll`, a mean over the entries of `images` `(B, C, H, W)`, in the total."""
        raise NotImplementedError

    def forward(
        self, target: Tensor, reconstruction: Tensor, penalty: Tensor, last_layer: Tensor, images_seen: int
    ) -> AutoencoderLossOutput:
        """The loss of one batch; float32 under autocast too.

        Args:
            target: images `(B, C, H, W)` in [-1, 1].
            reconstruction: output of the decoder, of the same shape.
            penalty: penalty on the latents, 0-dim: the quantizer's loss, or the mean KL divergence.
            last_layer: `decoder.conv_out.weight`, for the adaptive weight.
            images_seen: training images before this batch, over all ranks.
        """
        target, reconstruction = target.float(), reconstruction.float()
        rec, perceptual, nll = self._reconstruction(target, reconstruction)
        scaled = self.scale(target) * nll
        total = scaled + self.penalty_weight * penalty.float()
        terms = {"rec": rec, "perceptual": perceptual, "nll": nll, self.penalty: penalty.float()}
        if self.discriminator is not None:
            generator, generator_terms = self._generator(reconstruction, scaled, last_layer, images_seen)
            discriminator, discriminator_terms = self._discriminator(target, reconstruction.detach(), images_seen)
            total = total + generator + discriminator
            terms |= generator_terms | discriminator_terms
        return AutoencoderLossOutput(total, {name: term.detach() for name, term in terms.items()})

    def reconstruction_loss(self, target: Tensor, reconstruction: Tensor) -> Tensor:
        """`nll` without adversarial terms, for images `(B, C, H, W)` in [-1, 1]: 0-dim, float32."""
        return self._reconstruction(target.float(), reconstruction.float())[2]

    def _reconstruction(self, target: Tensor, reconstruction: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pixel distance, perceptual distance, and their weighted sum."""
        rec = self.pixel(reconstruction, target)
        perceptual = self.perceptual(reconstruction, target).mean()
        return rec, perceptual, rec + self.perceptual_weight * perceptual

    def _generator(
        self, reconstruction: Tensor, scaled_nll: Tensor, last_layer: Tensor, images_seen: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted generator term, whose gradients reach only the autoencoder."""
        frozen = {name: parameter.detach() for name, parameter in self.discriminator.named_parameters()}
        loss = generator_hinge(functional_call(self.discriminator, frozen, (reconstruction,)))
        weight = self.adversarial.weight * adaptive_weight(scaled_nll, loss, last_layer, self.adversarial.max_weight)
        factor = loss.new_full((), self.adversarial.generator_factor(images_seen))
        return factor * weight * loss, {"generator": loss, "d_weight": weight, "factor": factor}

    def _discriminator(self, real: Tensor, fake: Tensor, images_seen: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The discriminator's term, whose gradients reach only the discriminator."""
        # One call each, so that BatchNorm's statistics see real and reconstructed images separately.
        logits_real, logits_fake = self.discriminator(real), self.discriminator(fake)
        loss = self.adversarial.discriminator_factor(images_seen) * discriminator_hinge(logits_real, logits_fake)
        means = {"logits_real": logits_real.float().mean(), "logits_fake": logits_fake.float().mean()}
        return loss, {"discriminator": loss, **means}


class AutoencoderLoss(FirstStageLoss):
    """Loss of a VQ autoencoder: mean over pixels, and the quantizer's loss.

        total = nll + codebook_weight · codebook + factor · d_weight · generator + discriminator

    Args:
        *shared: see `FirstStageLoss`.
        codebook_weight: weight of the codebook loss.
        **more: see `FirstStageLoss`.
    """

    penalty = "codebook"

    def __init__(self, *shared: Any, codebook_weight: NonNegative = 1.0, **more: Any) -> None:  # noqa: ANN401
        super().__init__(*shared, penalty_weight=codebook_weight, **more)

    def scale(self, images: Tensor) -> int:
        """1: a mean over pixels."""
        return 1


class KLAutoencoderLoss(FirstStageLoss):
    """Loss of a KL autoencoder: sums over an image's pixels and latents, means over the batch.

        total = CHW · nll + kl_weight · mean KL(q(z|x) ‖ N(0, I)) + factor · d_weight · generator + discriminator

    A negative log-likelihood is a sum (Kingma & Welling 2014, arXiv 1312.6114, Eq. 10). Latent diffusion divides
    it by the exponential of a parameter that starts at 0 and is never trained; this loss omits that parameter.

    Args:
        *shared: see `FirstStageLoss`.
        kl_weight: weight of the KL divergence, in nats per image.
        **more: see `FirstStageLoss`.
    """

    penalty = "kl"

    def __init__(self, *shared: Any, kl_weight: NonNegative = 1e-6, **more: Any) -> None:  # noqa: ANN401
        super().__init__(*shared, penalty_weight=kl_weight, **more)

    def scale(self, images: Tensor) -> int:
        """CHW: a sum over the pixels of an image."""
        return images[0].numel()

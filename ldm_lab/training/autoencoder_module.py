"""Stage 1: the autoencoder. Rombach et al. 2022, section 3.1; Esser et al. 2021 (VQGAN), section 3.1."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ldm_lab.losses.autoencoder import AutoencoderLoss
from ldm_lab.metrics.reconstruction import psnr, ssim
from ldm_lab.models.codebook import CodebookUsage
from ldm_lab.models.vq_model import VQModel
from ldm_lab.serialization import PretrainedModel
from ldm_lab.training.stage_module import StageModule, trainable


class AutoencoderModule(StageModule):
    """Trains a VQ autoencoder, with its discriminator in the same step (one forward serves both players).

    Args:
        autoencoder: the network that is the result.
        loss: reconstruction, codebook and adversarial terms; owns the discriminator.
        codebook: keeps the codes in use; state of training that is not exported.
        legacy_codebook_loss: weight the two codebook terms as CompVis did (commitment 1, codebook 0.25).
        **training: optimizer, schedule and seed, see `StageModule`.
    """

    stage = "autoencoder"

    def __init__(
        self,
        autoencoder: VQModel,
        loss: AutoencoderLoss,
        codebook: CodebookUsage,
        legacy_codebook_loss: bool = True,
        **training: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(**training)
        self.autoencoder, self.loss, self.codebook = autoencoder, loss, codebook
        autoencoder.quantize.legacy = legacy_codebook_loss

    def setup(self, stage: str) -> None:
        """Load what the perceptual loss needs now: if it cannot be had, before any data is read."""
        self.loss.perceptual.setup()

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The autoencoder, and the discriminator that the loss owns."""
        return trainable(self.autoencoder, self.loss)

    def exported(self) -> dict[str, tuple[str, PretrainedModel]]:
        """The autoencoder alone."""
        return {"vqvae": ("autoencoder.", self.autoencoder)}

    def compile_networks(self) -> None:
        """The two halves of the autoencoder."""
        self.autoencoder.encoder.compile()
        self.autoencoder.decoder.compile()

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        """Images `(B, 3, H, W)` in [-1, 1] -> the sum of all terms."""
        images = batch["image"]
        latents = self.autoencoder.encode(images).latents  # (B, 3, H, W) -> (B, C, h, w)
        codes = self.autoencoder.quantize(latents)
        reconstruction = self.autoencoder.decode(codes.quantized, force_not_quantize=True).sample
        last_layer = self.autoencoder.decoder.conv_out.weight
        output = self.loss(images, reconstruction, codes.loss, last_layer, self.images_seen)
        self.latents, self.indices = latents.detach(), codes.info.indices
        self.count(images)
        self.log_terms("train", {"loss": output.total.detach(), **output.terms}, len(images))
        return output.total

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Step, then look after the codes: they may be replaced only when no gradient needs them."""
        super().optimizer_step(*args, **kwargs)
        step = self.images_seen // self.trainer.datamodule.global_batch_size
        self.codebook.update(self.autoencoder.quantize, self.latents, self.indices, step=step, seed=self.seed)

    def validation_step(self, batch: dict[str, Tensor], _: int) -> None:
        """Reconstruct held-out images; `val/loss` is the reconstruction loss without the adversary."""
        images = batch["image"]
        latents = self.autoencoder.encode(images).latents
        reconstruction = self.autoencoder.decode(latents).sample.float()
        terms = {
            "loss": self.loss.reconstruction_loss(images, reconstruction),
            "psnr": psnr(reconstruction, images),
            "ssim": ssim(reconstruction, images),
            "latent_std": latents.float().std(),
        }
        self.log_terms("val", terms, len(images))

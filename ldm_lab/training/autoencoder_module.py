"""Stage 1: the autoencoder. Rombach et al. 2022, section 3.1; Esser et al. 2021 (VQGAN), section 3.1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from ldm_lab.losses.autoencoder import AutoencoderLoss, FirstStageLoss
from ldm_lab.metrics.reconstruction import hues_kept, psnr, psnr_chroma, ssim
from ldm_lab.metrics.spectrum import high_frequency_share
from ldm_lab.models.codebook import CodebookUsage
from ldm_lab.models.first_stage import DECODER, FirstStage
from ldm_lab.models.pretrained import PretrainedModel
from ldm_lab.models.quantizer import straight_through
from ldm_lab.models.rotation import rotate
from ldm_lab.models.simvq import SimVQ
from ldm_lab.models.thumbnail import start_as_thumbnail
from ldm_lab.models.vq_model import VQModel
from ldm_lab.training.equivariance import OFF, UNCHANGED, Equivariance, Transform
from ldm_lab.training.latents import latent_shape, posterior_noise
from ldm_lab.training.stage_module import StageModule, trainable
from ldm_lab.utils.errors import UserError
from ldm_lab.utils.limits import Harmless

GRADIENTS = {"straight_through": straight_through, "rotation": rotate}
ADVERSARIAL = ("discriminator", "generator", "d_weight", "factor", "logits_real", "logits_fake")  # adversarial terms


class FirstStageModule(StageModule):
    """Trains an autoencoder and its discriminator in the same step; one forward pass serves both.

    Base class of `AutoencoderModule` and `KLAutoencoderModule`.

    Args:
        autoencoder: the network to train.
        loss: reconstruction, latent and adversarial terms; owns the discriminator.
        train: "all" of the autoencoder, or only its "decoder": latents then stay the same, so a UNet trained on
            them stays valid.
        start: "random" weights, or weights with which the latents are a "thumbnail" (see `start_as_thumbnail`).
        gradient_checkpointing: recompute activations in the backward pass instead of storing them.
        equivariance: arguments of `Equivariance`: how often a step trains on transformed latents.
        **training: optimizer, schedule and seed, see `StageModule`.

    Raises:
        UserError: `train` has another value; the decoder alone is to be trained on transformed latents.
    """

    stage = "autoencoder"

    def __init__(
        self,
        autoencoder: FirstStage,
        loss: FirstStageLoss,
        train: str = "all",
        start: Literal["random", "thumbnail"] = "random",
        gradient_checkpointing: Annotated[bool, Harmless] = False,
        equivariance: Mapping[str, float] = OFF,
        **training: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(**training)
        self.autoencoder, self.loss = autoencoder, loss
        choose_trained(autoencoder, train)
        if start == "thumbnail":
            start_as_thumbnail(autoencoder)
        self.equivariance = Equivariance(**equivariance)
        if train == "decoder" and self.equivariance.probability:
            raise UserError(
                f"model.equivariance.probability={self.equivariance.probability}: changes the latents, which"
                " model.train=decoder leaves as they are; leave one of them out"
            )
        if gradient_checkpointing:
            autoencoder.enable_gradient_checkpointing()

    def setup(self, stage: str) -> None:
        """Load the weights of the perceptual loss, so that missing weights raise before any data is read.

        Also note the range of the images in the autoencoder.
        """
        self.loss.perceptual.setup()
        self.autoencoder.value_range = self.trainer.datamodule.pixels.value_range

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Parameters of the autoencoder and of the loss's discriminator."""
        return trainable(self.autoencoder, self.loss)

    def exported(self) -> dict[str, tuple[str, PretrainedModel]]:
        """Only the autoencoder."""
        return {"vqvae": ("autoencoder.", self.autoencoder)}

    def compile_networks(self) -> None:
        """Compile encoder and decoder."""
        from torch._functorch import config  # slow to import

        config.donated_buffer = False  # the adaptive weight's backward pass keeps the graph
        self.autoencoder.encoder.compile(dynamic=False)  # one kernel per size, whatever was compiled before
        self.autoencoder.decoder.compile(dynamic=False)

    def reconstruct(self, batch: dict[str, Tensor], transform: Transform = UNCHANGED) -> tuple[Tensor, Tensor]:
        """Reconstruction of a training batch from its transformed latents, `(B, C, H, W)` if these are unchanged.

        Second comes the penalty on the latents, 0-dim.
        """
        raise NotImplementedError

    def encode(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Held-out images `(B, C, H, W)` -> latents `(B, c, h, w)`, and further metrics to log."""
        raise NotImplementedError

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        """Images `(B, C, H, W)` in [-1, 1] -> the sum of all loss terms."""
        images, last_layer = batch["image"], self.autoencoder.decoder.conv_out.weight
        transform = self._transform(images)
        reconstruction, penalty = self.reconstruct(batch, transform)
        target = transform.images(images, self.autoencoder.downsample_factor)
        output = self.loss(target, reconstruction, penalty, last_layer, self.images_seen)
        self.count(images)
        terms = {"loss": output.total.detach(), **output.terms}
        adversarial = {name: terms.pop(name) for name in ADVERSARIAL if name in terms}
        self.log_terms("train", terms, len(images))
        self.log_terms("disc", adversarial, len(images))
        return output.total

    def _transform(self, images: Tensor) -> Transform:
        """The transform of this step's latents; images stay large enough for every term of the loss."""
        if not self.equivariance.probability:
            return UNCHANGED
        factor, step = self.autoencoder.downsample_factor, self.images_seen // self.trainer.datamodule.global_batch_size
        height, width = images.shape[-2:]
        smallest = -(-self.loss.smallest_side // factor)  # rounded up
        return self.equivariance.draw(self.seed, step, (height // factor, width // factor), smallest)

    def validation_step(self, batch: dict[str, Tensor], _: int) -> None:
        """Reconstruct held-out images; `val/loss` is the mean reconstruction loss without the adversary."""
        images = batch["image"]
        latents, more = self.encode(images)
        reconstruction = self.autoencoder.decode(latents).sample.float()
        terms = {
            "loss": self.loss.reconstruction_loss(images, reconstruction),
            "psnr": psnr(reconstruction, images),
            **(colours(reconstruction, images) if images.shape[1] == 3 else {}),
            "ssim": ssim(reconstruction, images),
            "latent_std": latents.float().std(),
            "latent_high_frequency": high_frequency_share(latents),
        }
        self.log_terms("val", {**terms, **more}, len(images))


class AutoencoderModule(FirstStageModule):
    """Trains a VQ autoencoder.

    Quantizer and gradient are choices of training: the autoencoder holds a plain codebook whatever they are.

    Args:
        autoencoder: the network to train.
        loss: reconstruction, codebook and adversarial terms.
        codebook: keeps the codes in use; its state belongs to training and is not exported.
        legacy_codebook_loss: weight the two codebook terms as CompVis did (commitment 1, codebook 0.25).
        quantizer: `plain` trains each code, `simvq` a matrix that moves all codes (see `SimVQ`).
        gradient: of the latents through quantization: `straight_through`, or `rotation` (see `rotation.rotate`).
        **training: see `FirstStageModule`.

    Raises:
        UserError: quantizer or gradient would have no effect, as `train` is "decoder".
    """

    def __init__(
        self,
        autoencoder: VQModel,
        loss: AutoencoderLoss,
        codebook: CodebookUsage,
        legacy_codebook_loss: bool = True,
        quantizer: Literal["plain", "simvq"] = "plain",
        gradient: Literal["straight_through", "rotation"] = "straight_through",
        **training: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(autoencoder, loss, **training)
        self.codebook = codebook
        self.quantized: list[tuple[Tensor, Tensor]] = []  # latents and code indices of this step's micro-batches
        plain = autoencoder.quantize
        self.learns_codes = plain.embedding.weight.requires_grad
        for key, value, default in (("quantizer", quantizer, "plain"), ("gradient", gradient, "straight_through")):
            if value != default and not self.learns_codes:
                raise UserError(f"model.{key}={value}: does nothing with model.train=decoder; leave one of them out")
        plain.legacy, plain.gradient = legacy_codebook_loss, GRADIENTS[gradient]
        self.simvq = SimVQ(plain.n_e, plain.vq_embed_dim) if quantizer == "simvq" else None
        if self.simvq is not None:
            self.simvq.write(plain.embedding.weight.requires_grad_(False))

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Parameters of the autoencoder, with SimVQ's matrix, and of the loss's discriminator."""
        parts = [self.autoencoder] if self.simvq is None else [self.autoencoder, self.simvq]
        return trainable(nn.ModuleList(parts), self.loss)

    def keep_codes(self) -> None:
        """Train on from the codes of the autoencoder, which were trained before: no new ones are drawn."""
        self.codebook.initialised.fill_(True)
        if self.simvq is not None:
            self.simvq.start(self.autoencoder.quantize.embedding.weight)

    def reconstruct(self, batch: dict[str, Tensor], transform: Transform = UNCHANGED) -> tuple[Tensor, Tensor]:
        """Decode the codes nearest to the transformed latents; the penalty is the quantizer's loss."""
        latents = self.autoencoder.latents(batch["image"])  # (B, C, H, W) -> (B, c, h, w)
        latents = transform.latents(latents)  # before quantization, as diffusion's latents are
        codes = self.autoencoder.quantize(latents, None if self.simvq is None else self.simvq())
        self.quantized.append((latents.detach(), codes.info.indices))
        return self.autoencoder.decode(codes.quantized, force_not_quantize=True).sample, codes.loss

    def encode(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Latents before quantization; `CodebookUse` logs the codes."""
        return self.autoencoder.latents(images), {}

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Step, then update the codebook: codes may only be replaced when no backward pass still needs them."""
        super().optimizer_step(*args, **kwargs)
        latents, indices = (torch.cat(parts) for parts in zip(*self.quantized, strict=True))
        self.quantized.clear()
        quantizer = self.autoencoder.quantize
        if self.simvq is not None:
            self.simvq.write(quantizer.embedding.weight)
        if self.learns_codes and not self.step_left_out:
            step = self.images_seen // self.trainer.datamodule.global_batch_size
            self.codebook.update(quantizer, latents, indices, step=step, seed=self.seed)
            if self.simvq is not None:
                self.simvq.follow(quantizer.embedding.weight)


class KLAutoencoderModule(FirstStageModule):
    """Trains a KL autoencoder (Kingma & Welling 2014, arXiv 1312.6114) on latents drawn from the posterior.

    Its arguments are those of `FirstStageModule`; the autoencoder is an `AutoencoderKL`.
    """

    def on_before_batch_transfer(self, batch: dict[str, Tensor], dataloader_idx: int) -> dict[str, Tensor]:
        """Draw the posterior noise of training images on the CPU, from (seed, position)."""
        if self.trainer.training:
            shape = latent_shape(self.autoencoder, batch["image"].shape[-2:])
            positions = batch["position"].tolist()
            batch["posterior_noise"] = posterior_noise(self.autoencoder, self.seed, positions, shape)
        return batch

    def reconstruct(self, batch: dict[str, Tensor], transform: Transform = UNCHANGED) -> tuple[Tensor, Tensor]:
        """Decode transformed draws of latents; the penalty is the KL divergence from N(0, I), in nats per image."""
        posterior = self.autoencoder.encode(batch["image"]).latent_dist
        latents = posterior.from_noise(batch["posterior_noise"])  # (B, C, h, w)
        return self.autoencoder.decode(transform.latents(latents)).sample, posterior.kl().mean()

    def encode(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Mode of the posterior; `kl` in nats per image; `posterior_std`, the mean standard deviation."""
        posterior = self.autoencoder.encode(images).latent_dist
        return posterior.mode(), {"kl": posterior.kl().mean(), "posterior_std": posterior.std.mean()}


def colours(reconstruction: Tensor, images: Tensor) -> dict[str, Tensor]:
    """Metrics of the colours of RGB images `(B, 3, H, W)`."""
    chroma, hues = psnr_chroma(reconstruction, images), hues_kept(reconstruction, images)
    return {"psnr_chroma": chroma, "hues_kept": hues}


def choose_trained(autoencoder: FirstStage, train: str) -> None:
    """Set `requires_grad` for all parts of an autoencoder, or only for those of its decoder."""
    if train not in ("all", "decoder"):
        raise UserError(f"model.train={train}: must be all or decoder")
    for name, part in autoencoder.named_children():
        part.requires_grad_(train == "all" or name in DECODER)

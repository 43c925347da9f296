"""Stage 2: diffusion on the latents of a frozen autoencoder. Rombach et al. 2022, section 3.2."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count, islice
from typing import Annotated, Any, Literal

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor

from ldm_lab.diffusion.objective import DenoisingObjective
from ldm_lab.diffusion.process import Process
from ldm_lab.models.first_stage import FirstStage
from ldm_lab.models.pretrained import PretrainedModel
from ldm_lab.models.unet import UNet2DModel
from ldm_lab.pipeline import LDMPipeline
from ldm_lab.training.ema import EMA
from ldm_lab.training.latents import latent_shape, posterior_noise
from ldm_lab.training.power_ema import PowerEMA
from ldm_lab.training.stage_module import StageModule, trainable
from ldm_lab.training.statistics import moments, of_all_ranks, pooled
from ldm_lab.utils import randomness
from ldm_lab.utils.errors import UserError
from ldm_lab.utils.limits import Harmless, Positive
from ldm_lab.utils.pixels import PixelFormat
from ldm_lab.utils.terminal import say_once


class DiffusionModule(StageModule):
    """Trains a UNet to denoise scaled latents; validation, previews and the result use its moving average.

    Args:
        unet: the network to train.
        autoencoder: the first stage; frozen.
        scheduler: noise schedule of training; sampling uses the same object.
        objective: noise, target and weight of the denoising loss.
        ema: makes the moving average of a network.
        power_ema: lengths of further averages, for a choice after training (see `PowerEMA`); None: none.
        scaling_factor: a number, or "measure": 1 / std of the latents, measured once when training starts.
        gradient_checkpointing: recompute the UNet's activations in the backward pass instead of storing them.
        **training: optimizer, schedule and seed, see `StageModule`.

    Raises:
        UserError: the UNet's channels are not those of the latents.
    """

    stage = "diffusion"
    MEASURED_IMAGES = 2048

    def __init__(
        self,
        unet: UNet2DModel,
        autoencoder: FirstStage,
        scheduler: Process,
        objective: DenoisingObjective,
        ema: Callable[[UNet2DModel], EMA],
        scaling_factor: Positive | Literal["measure"] = 1.0,
        gradient_checkpointing: Annotated[bool, Harmless] = False,
        power_ema: Sequence[float] | None = None,
        **training: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(**training)
        LDMPipeline(autoencoder, unet, scheduler)  # raises if the parts do not fit
        unet.zero_residuals()
        self.unet, self.ema = unet, ema(unet)
        self.power_ema = None if power_ema is None else PowerEMA(unet, power_ema)
        if gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        self.autoencoder = autoencoder.eval().requires_grad_(False)
        self.scheduler, self.objective = scheduler, objective
        self.measures_scale = scaling_factor == "measure"
        if not self.measures_scale:
            if isinstance(scaling_factor, str):
                raise UserError(f"model.scaling_factor={scaling_factor}: give a number, or measure")
            autoencoder.register_to_config(scaling_factor=float(scaling_factor))

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Parameters of the UNet."""
        return trainable(self.unet)

    def exported(self) -> dict[str, tuple[str, PretrainedModel]]:
        """The averaged UNet and the first stage, so that one file holds the complete model."""
        return {"unet": ("ema.model.", self.ema.model), "vqvae": ("autoencoder.", self.autoencoder)}

    def configs(self) -> dict[str, dict[str, Any]]:
        """Configs of the networks and of the scheduler."""
        scheduler = {"_class_name": self.scheduler.class_name(), **self.scheduler.config}
        return {**super().configs(), "scheduler": scheduler}

    def compile_networks(self) -> None:
        """Compile the UNet, its EMA and the encoder."""
        for network in (self.unet, self.ema.model, self.autoencoder.encoder):
            network.compile(dynamic=False)  # one kernel per size, whatever was compiled before

    def pipeline(self) -> LDMPipeline:
        """The current model with averaged weights."""
        return LDMPipeline(self.autoencoder, self.ema.model, self.scheduler)

    def train(self, mode: bool = True) -> DiffusionModule:
        """Set the mode of the UNet only; first stage and EMA stay in evaluation mode."""
        super().train(mode)
        self.autoencoder.eval()
        self.ema.eval()
        return self

    @torch.no_grad()
    def encode(self, batch: dict[str, Tensor]) -> Tensor:
        """A batch -> scaled latents `(B, C, h, w)`, float32; a KL first stage draws them with `posterior_noise`.

        Uses cached `moments` `(B, M, h, w)` if the batch has them, else encodes `image` `(B, 3, H, W)` in [-1, 1].
        """
        return self._unscaled(batch) * self.autoencoder.config.scaling_factor

    def _unscaled(self, batch: dict[str, Tensor]) -> Tensor:
        known = "moments" in batch
        found = batch["moments"].float() if known else self.autoencoder.moments(batch["image"])
        return self.autoencoder.from_moments(found, batch["posterior_noise"]).float()

    def setup(self, stage: str) -> None:
        """Write the latent size into the UNet's config, as sampling starts from noise of that size."""
        take_range(self.autoencoder, self.trainer.datamodule.pixels)
        channels, height, width = latent_shape(self.autoencoder, self.trainer.datamodule.image_size)
        self.scheduler.fit((channels, height, width))
        size = height if height == width else [height, width]
        for network in (self.unet, self.ema.model, *(self.power_ema.averages.values() if self.power_ema else ())):
            network.register_to_config(sample_size=size)

    @torch.no_grad()
    def on_fit_start(self) -> None:
        """Measure the latents' scale, unless it is set or a checkpoint holds it; ignores the first stage's own."""
        if not self.measures_scale:
            return
        shape = latent_shape(self.autoencoder, self.trainer.datamodule.image_size)
        places = count(self.global_rank, self.trainer.world_size)  # of this rank's images in the measured sample
        found = []
        for batch in self.trainer.datamodule.training_sample(self.MEASURED_IMAGES):
            positions = islice(places, len(batch["index"]))
            batch["posterior_noise"] = posterior_noise(self.autoencoder, self.seed, positions, shape, stream="scale")
            found.append(moments(self._unscaled(move_data_to_device(batch, self.device))))
        _, std = pooled(of_all_ranks(self.trainer, found))
        self.autoencoder.register_to_config(scaling_factor=1 / std)
        self.measures_scale = False

    def on_before_batch_transfer(self, batch: dict[str, Tensor], dataloader_idx: int) -> dict[str, Tensor]:
        """Draw noise and timesteps on the CPU: from (seed, position) in training, fixed in validation."""
        data = self.trainer.datamodule
        shape = latent_shape(self.autoencoder, data.image_size)
        positions = batch["position"].tolist()
        if self.trainer.training:
            purpose = ""
            batch["timestep"] = self.objective.draw_timesteps(self.seed, positions, data.global_batch_size)
        else:
            purpose = "validation "
            batch["timestep"] = self.objective.validation_timesteps(data.num_val)[batch["position"]]
        batch["noise"] = randomness.normal(self.seed, f"{purpose}noise", positions, shape)
        batch["posterior_noise"] = posterior_noise(
            self.autoencoder, self.seed, positions, shape, stream=f"{purpose}posterior"
        )
        return batch

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        """Images `(B, 3, H, W)` or cached `moments` `(B, M, h, w)` -> mean weighted denoising loss."""
        latents = self.encode(batch)
        loss = self.objective(lambda x, t: self.unet(x, t).sample, latents, batch["noise"], batch["timestep"]).mean()
        self.count(latents)
        self.log_terms("train", {"loss": loss.detach()}, len(latents))
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Step, then update the averages: once per optimizer step, whatever the gradient accumulation."""
        super().optimizer_step(*args, **kwargs)
        if self.power_ema is not None:  # after a skipped step too, whose weights are those of the step before
            self.power_ema.update(self.unet, self.images_seen, self.trainer.datamodule.global_batch_size)
        if not self.step_left_out:
            self.ema.update(self.unet)

    def validation_step(self, batch: dict[str, Tensor], _: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Denoising loss of the averaged weights with fixed noise; dataloader 0: held-out images, 1: training images.

        Returns:
            For callbacks: `latents` `(B, C, h, w)`, scaled, and `losses` `(B,)`.
        """
        latents = self.encode(batch)
        losses = self.objective(lambda x, t: self.ema.model(x, t).sample, latents, batch["noise"], batch["timestep"])
        name = ("loss", "loss_on_training_images")[dataloader_idx]
        self.log_terms("val", {name: losses.mean()}, len(latents))
        return {"latents": latents, "losses": losses}

    def on_load_checkpoint(self, state: dict[str, Any]) -> None:
        """Restore the scaling factor from the checkpoint, as it is measured only once."""
        super().on_load_checkpoint(state)
        scale = state["ldm_lab"]["configs"]["vqvae"]["scaling_factor"]
        self.autoencoder.register_to_config(scaling_factor=scale)
        self.measures_scale = False


def take_range(autoencoder: FirstStage, pixels: PixelFormat) -> None:
    """Note the range of the images in the model; a line says if the autoencoder was trained on another range."""
    if autoencoder.value_range != pixels.value_range:
        say_once(f"the autoencoder was trained on images of {autoencoder.pixels}; these are of {pixels}")
        autoencoder.value_range = pixels.value_range

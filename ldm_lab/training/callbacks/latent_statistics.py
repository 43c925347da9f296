"""Logs mean and standard deviation of the latents, which diffusion expects to be near 0 and 1."""

from __future__ import annotations

from lightning import Callback, Trainer
from torch import Tensor

from ldm_lab.training.diffusion_module import DiffusionModule
from ldm_lab.training.statistics import moments, of_all_ranks, pooled


class LatentStatistics(Callback):
    """Logs mean and standard deviation of the scaled latents of held-out images: `val/latent_mean`, `val/latent_std`.

    The added noise has mean 0 and standard deviation 1; latents far from these shift the signal-to-noise ratio of every
    noise level. The statistics are over all entries of all latents, whatever the batch size and the number of ranks.
    """

    def on_validation_start(self, trainer: Trainer, module: DiffusionModule) -> None:
        """Clear the statistics."""
        self.rows: list[Tensor] = []  # of each batch: number, mean and variance of the entries, (3,)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        module: DiffusionModule,
        outputs: dict[str, Tensor],
        batch: dict[str, Tensor],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add the statistics of a batch, on the device."""
        if dataloader_idx == 0:
            self.rows.append(moments(outputs["latents"]))  # of (B, C, h, w)

    def on_validation_epoch_end(self, trainer: Trainer, module: DiffusionModule) -> None:
        """Combine the statistics of all ranks and log."""
        mean, std = pooled(of_all_ranks(trainer, self.rows))
        module.log("val/latent_mean", mean, batch_size=1, sync_dist=True)
        module.log("val/latent_std", std, batch_size=1, sync_dist=True)

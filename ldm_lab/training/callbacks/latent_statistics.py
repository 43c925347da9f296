"""Whether the latents have the scale that diffusion is made for."""

from __future__ import annotations

import torch
from lightning import Callback, Trainer
from torch import Tensor

from ldm_lab.training.diffusion_module import DiffusionModule


class LatentStatistics(Callback):
    """Logs mean and standard deviation of the scaled latents of held-out images: `val/latent_mean`, `val/latent_std`.

    The noise that is added to them has 0 and 1, and where theirs are far from that, its levels mean something else.
    They are taken over all entries of all latents, whatever the batch size and the number of ranks.
    """

    def on_validation_start(self, trainer: Trainer, module: DiffusionModule) -> None:
        """Begin at zero."""
        self._sums = torch.zeros(3, dtype=torch.float64, device=module.device)  # entries, their sum, that of squares

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        module: DiffusionModule,
        outputs: dict[str, Tensor],
        batch: dict[str, Tensor],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add the latents of a batch up, on the device."""
        if dataloader_idx == 0:
            latents = outputs["latents"].double()  # (B, C, h, w)
            ones = latents.new_full((), latents.numel())
            self._sums += torch.stack([ones, latents.sum(), latents.square().sum()])

    def on_validation_epoch_end(self, trainer: Trainer, module: DiffusionModule) -> None:
        """Log over all ranks."""
        number, total, squares = trainer.strategy.reduce(self._sums, reduce_op="sum").tolist()
        mean = total / number
        module.log("val/latent_mean", mean, batch_size=1, sync_dist=True)
        module.log("val/latent_std", max(0.0, squares / number - mean**2) ** 0.5, batch_size=1, sync_dist=True)

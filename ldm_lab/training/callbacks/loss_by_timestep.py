"""Logs the held-out loss by range of timesteps."""

from __future__ import annotations

import torch
from lightning import Callback, Trainer
from torch import Tensor

from ldm_lab.training.diffusion_module import DiffusionModule
from ldm_lab.training.statistics import of_all_ranks

PARTS = 10  # of the range of time


class LossByTimestep(Callback):
    """Logs the loss on held-out images by tenths of the timesteps: `val/loss_t0`, the least noise, to `val/loss_t9`.

    Each metric is the mean over all images whose fixed timestep is in that tenth, whatever the batch size and number of
    ranks. `val/loss` is their mean, weighted by image counts. A tenth without an image is not logged.
    """

    def on_validation_start(self, trainer: Trainer, module: DiffusionModule) -> None:
        """Clear the losses."""
        self.rows: list[Tensor] = []  # of each batch: sum of losses and number of images per tenth, (2, PARTS)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        module: DiffusionModule,
        outputs: dict[str, Tensor],
        batch: dict[str, Tensor],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add the losses of a batch, on the device."""
        if dataloader_idx == 0:
            losses = outputs["losses"].float()  # (B,)
            parts = batch["timestep"] * PARTS // len(module.scheduler)  # (B,)
            both = torch.stack([losses, torch.ones_like(losses)])
            self.rows.append(both.new_zeros(2, PARTS).index_add_(1, parts, both))

    def on_validation_epoch_end(self, trainer: Trainer, module: DiffusionModule) -> None:
        """Log the means over all ranks."""
        sums = of_all_ranks(trainer, self.rows).sum(0)  # (n, 2, PARTS) -> (2, PARTS)
        for part, (total, images) in enumerate(sums.T.tolist()):
            if images:
                module.log(f"val/loss_t{part}", total / images, batch_size=1, sync_dist=True)

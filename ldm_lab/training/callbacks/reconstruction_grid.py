"""Shows reconstructions of held-out images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from lightning import Callback, Trainer
from torch import Tensor

from ldm_lab.training.autoencoder_module import FirstStageModule
from ldm_lab.training.callbacks.pictures import shared, show
from ldm_lab.utils.limits import Count


class ReconstructionGrid(Callback):
    """Shows, after each validation, a row of originals above a row of their reconstructions, always the same images.

    Args:
        folder: `samples/` of the stage.
        images: number of images.
    """

    def __init__(self, folder: str, images: Count = 16) -> None:
        self.folder, self.images = Path(folder), images

    @torch.no_grad()
    def on_validation_end(self, trainer: Trainer, module: FirstStageModule) -> None:
        """Reconstruct and show; each rank reconstructs its share."""
        if trainer.sanity_checking:
            return
        originals = trainer.datamodule.preview(self.images).to(module.device)  # (B, C, H, W)

        def reconstruct(indices: Sequence[int]) -> Tensor:
            return module.autoencoder.decode(module.autoencoder.latents(originals[indices])).sample

        reconstructions = shared(trainer, len(originals), reconstruct)
        width = min(8, len(originals))
        rows = [
            row
            for start in range(0, len(originals), width)
            for row in (originals[start : start + width], reconstructions[start : start + width].float())
        ]
        show(trainer, module, self.folder, "reconstructions", torch.cat(rows), columns=width)

"""All processes start from the same state."""

from __future__ import annotations

import torch
from lightning import Callback, Trainer

from ldm_lab.training.stage_module import StageModule
from ldm_lab.utils.reading import LoadError


class SameStart(Callback):
    """Compare, before the first step, at how many images each process starts.

    Each has chosen its checkpoint by what it finds in the run folder, before any of them knew of the others.
    """

    def on_train_start(self, trainer: Trainer, module: StageModule) -> None:
        """Raise `LoadError`, in all processes, where they differ: they see different files."""
        if trainer.world_size == 1:
            return
        seen = torch.tensor([module.images_seen, -module.images_seen])
        bounds = trainer.strategy.reduce(seen.to(trainer.strategy.root_device), reduce_op="max")
        most, least = int(bounds[0]), -int(bounds[1])
        if most != least:
            raise LoadError(
                f"some processes start at {least:,} images, others at {most:,}:"
                " paths.runs must be one folder that all of them see"
            )

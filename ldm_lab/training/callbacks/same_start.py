"""Checks that all processes resume from the same checkpoint."""

from __future__ import annotations

import torch
from lightning import Callback, Trainer

from ldm_lab.training.stage_module import StageModule
from ldm_lab.utils.reading import LoadError


class SameStart(Callback):
    """Compares, before the first step, the number of images at which each process starts.

    Each process has chosen its checkpoint from the files that it sees in the run folder, before any communication.
    """

    def on_train_start(self, trainer: Trainer, module: StageModule) -> None:
        """Raise `LoadError` in all processes if the numbers differ, as the processes then see different files."""
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

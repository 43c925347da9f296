"""Lets all ranks agree before training: on one batch size, and on the checkpoint to resume from."""

from __future__ import annotations

import torch
from lightning import Callback, Trainer

from ldm_lab.training.stage_module import StageModule
from ldm_lab.utils.reading import LoadError


class SmallestBatchSize(Callback):
    """Gives all ranks the smallest of the batch sizes that the ranks have found to fit their devices.

    It acts in `setup`: the process group exists, and no loader exists yet.
    """

    def setup(self, trainer: Trainer, module: StageModule, stage: str) -> None:
        """Reduce the batch size over ranks, and set gradient accumulation to match."""
        data = trainer.datamodule
        if trainer.world_size == 1 or data.batch_size is None:
            return
        found = torch.tensor(data.batch_size, device=trainer.strategy.root_device)
        smallest = int(trainer.strategy.reduce(found, reduce_op="min"))
        if smallest < data.batch_size and trainer.is_global_zero:
            print(f"data.batch_size={smallest} fits all devices", flush=True)
        data.batch_size = smallest
        trainer.accumulate_grad_batches = data.accumulation(trainer.world_size)


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

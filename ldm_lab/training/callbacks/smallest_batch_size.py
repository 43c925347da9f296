"""One batch size for all devices."""

from __future__ import annotations

import torch
from lightning import Callback, Trainer

from ldm_lab.training.stage_module import StageModule


class SmallestBatchSize(Callback):
    """Where every rank has found what fits its own device, let all of them take the smallest.

    It acts when there is a process group and no loader yet.
    """

    def setup(self, trainer: Trainer, module: StageModule, stage: str) -> None:
        """Compare notes; accumulation follows."""
        data = trainer.datamodule
        if trainer.world_size == 1 or data.batch_size is None:
            return
        found = torch.tensor(data.batch_size, device=trainer.strategy.root_device)
        smallest = int(trainer.strategy.reduce(found, reduce_op="min"))
        if smallest < data.batch_size and trainer.is_global_zero:
            print(f"data.batch_size={smallest} fits all devices", flush=True)
        data.batch_size = smallest
        trainer.accumulate_grad_batches = data.accumulation(trainer.world_size)

"""Agrees on one batch size for all devices."""

from __future__ import annotations

import torch
from lightning import Callback, Trainer

from ldm_lab.training.stage_module import StageModule


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

"""Logs the learning rate."""

from __future__ import annotations

from lightning import Callback, Trainer

from ldm_lab.training.stage_module import StageModule


class LearningRate(Callback):
    """Logs `train/lr`, the learning rate of the coming step."""

    def on_train_batch_start(self, trainer: Trainer, module: StageModule, batch: dict, batch_idx: int) -> None:
        """Log the learning rate of the first parameter group; all groups follow one schedule."""
        module.log("train/lr", trainer.optimizers[0].param_groups[0]["lr"], batch_size=1)

"""Callbacks that tests put into a training with `+callbacks.<name>._target_=tests.callbacks.<Class>`."""

import os
import signal
from pathlib import Path

import torch
from lightning import Callback


class Journal(Callback):
    """Notes in `folder/saves.txt` at how many images each checkpoint was written."""

    def __init__(self, folder):
        self.path = Path(folder) / "saves.txt"

    def on_save_checkpoint(self, trainer, module, state):
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(f"{module.images_seen}\n")


class Signal(Callback):
    """Sends one process a Ctrl-C during the step that begins at `images` training images of a stage."""

    def __init__(self, stage, images, times=1, rank=0):
        self.place, self.times = (stage, images, rank), times

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if (module.stage, module.images_seen, trainer.global_rank) == self.place:
            for _ in range(self.times):
                os.kill(os.getpid(), signal.SIGINT)


class FailAtTheEnd(Callback):
    """The power goes off during the last validation."""

    def on_validation_start(self, trainer, module):
        if trainer.global_step >= trainer.max_steps:
            raise RuntimeError("power cut")


class DumpWeights(Callback):
    """Each rank writes what it has at the end: `folder/<stage>_<rank>.pt`."""

    def __init__(self, folder):
        self.folder = Path(folder)

    def on_train_end(self, trainer, module):
        self.folder.mkdir(parents=True, exist_ok=True)
        torch.save(module.state_dict(), self.folder / f"{module.stage}_{trainer.global_rank}.pt")


class FoundBatchSizes(Callback):
    """Rank r has found that `sizes[r]` images fit its device."""

    def __init__(self, sizes):
        self.sizes = sizes

    def setup(self, trainer, module, stage):
        trainer.datamodule.batch_size = self.sizes[trainer.global_rank]

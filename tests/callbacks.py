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
    """Sends a signal in a step that begins at `images` images of a stage, in a validation there, or in another hook.

    Args:
        stage: in which.
        images: after so many.
        times: how often.
        rank: which process does so.
        where: "train", "validation", "setup", "fit_end" (before the export) or "teardown".
        number: the signal.
        group: send it to the whole group of processes, as terminals and schedulers do.
    """

    def __init__(self, stage, images, times=1, rank=0, where="train", number=signal.SIGINT, group=False):
        self.place, self.times = (where, stage, images, rank), times
        self.number, self.send = number, os.killpg if group else os.kill

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.pass_by("train", trainer, module)

    def on_validation_batch_start(self, trainer, module, batch, batch_idx, dataloader_idx=0):
        self.pass_by("validation", trainer, module)

    def setup(self, trainer, module, stage):
        self.pass_by("setup", trainer, module)

    def on_fit_end(self, trainer, module):
        self.pass_by("fit_end", trainer, module)

    def teardown(self, trainer, module, stage):
        self.pass_by("teardown", trainer, module)

    def pass_by(self, where, trainer, module):
        if (where, module.stage, module.images_seen, trainer.global_rank) == self.place:
            self.act(trainer)

    def act(self, trainer):
        for _ in range(self.times):
            self.send(os.getpid() if self.send is os.kill else os.getpgrp(), self.number)


class Ask(Signal):
    """Asks for an end at such a place, as callbacks do."""

    def act(self, trainer):
        trainer.should_stop = True


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


class Stream(Callback):
    """Each rank notes of every training image what was drawn for it: `folder/<stage>.txt`, a line each."""

    DRAWN = ("timestep", "noise", "posterior_noise")

    def __init__(self, folder):
        self.folder = Path(folder)

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        drawn = {key: batch[key] for key in self.DRAWN if batch.get(key) is not None}
        lines = ""
        for place, (position, index) in enumerate(zip(batch["position"], batch["index"], strict=True)):
            sums = [f"{key} {float(values[place].double().sum())!r}" for key, values in drawn.items()]
            lines += " ".join([f"{int(position):04d} image {int(index)}", *sums]) + "\n"
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / f"{module.stage}.txt", "a", encoding="utf-8") as file:
            file.write(lines)

"""Callbacks by which a training meets with misfortune: `+callbacks.fault._target_=tests.reliability.faults.Fault`."""

import os
import signal
import time
from pathlib import Path

from lightning import Callback
from PIL import Image


class Fault(Callback):
    """At one place of a stage one rank is killed, raises an error or hangs; another may be busy meanwhile.

    Args:
        stage: in which.
        rank: that fails.
        what: "kill", "raise" or "refuse" (an error of the user's).
        where: "build" (before the processes know of each other), "setup", "train", "validation" or "save".
        busy: a rank that is busy with something of its own for minutes, from the step before.
    """

    def __init__(self, stage, rank, what, where, busy=None):
        self.stage, self.rank, self.what, self.where, self.busy = stage, rank, what, where, busy
        if where == "build" and int(os.environ.get("LOCAL_RANK", 0)) == rank:
            self.fail()

    def fail(self):
        print(f"fault at {time.time()}", flush=True)
        if self.what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise {"raise": RuntimeError, "refuse": ValueError}[self.what]("a fault of this rank")

    def at(self, where, trainer, module):
        if where != self.where or module.stage != self.stage:
            return
        if trainer.global_rank == self.busy:
            time.sleep(300)
        if trainer.global_rank == self.rank:
            time.sleep(1)  # the others are where they wait
            self.fail()

    def setup(self, trainer, module, stage):
        self.at("setup", trainer, module)

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if module.images_seen == 24:
            self.at("train", trainer, module)

    def on_validation_batch_start(self, trainer, module, batch, batch_idx, dataloader_idx=0):
        self.at("validation", trainer, module)

    def on_save_checkpoint(self, trainer, module, state):
        self.at("save", trainer, module)


class Spoil(Callback):
    """During a training some files below `folder` go, are cut short, or become others: see `SPOILING`."""

    def __init__(self, folder, images):
        self.folder, self.images = Path(folder), images

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if module.images_seen == self.images and trainer.is_global_zero:
            for number, path in enumerate(sorted(self.folder.glob("*.png"))):
                if change := SPOILING.get(number % 10):
                    change(path)


def _cut(path):
    path.write_bytes(path.read_bytes()[:99])


def _exchange(path):
    Image.new("RGB", (40, 50)).save(path.with_suffix(".tmp"), "PNG")
    path.with_suffix(".tmp").replace(path)


def _make_folder(path):
    path.unlink()
    path.mkdir()


SPOILING = {0: Path.unlink, 1: _cut, 2: _exchange, 3: _make_folder}

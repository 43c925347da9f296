"""Saves intermediate models for sampling, without the optimizer state."""

from __future__ import annotations

import filecmp
import shutil
import sys
from pathlib import Path

from lightning import Callback, Trainer

from ldm_lab.checkpoints import averages
from ldm_lab.checkpoints.locate import snapshots
from ldm_lab.training.callbacks.every import Every
from ldm_lab.training.checkpoint_io import place
from ldm_lab.training.diffusion_module import DiffusionModule
from ldm_lab.utils.limits import Count
from ldm_lab.utils.terminal import say


class Snapshots(Callback):
    """Saves, every so many images, the model with averaged weights as a pipeline folder: `<folder>/<images seen>/`.

    The weights are float32, exactly the values that validation uses: a checkpoint of the same step samples the same
    images, and `init=` loses no precision. Files that do not change, above all the first stage, are stored once, as
    hard links.

    With `model.power_ema` a snapshot also holds those averages (see `checkpoints.averages`), and training ends with a
    snapshot, as an average up to some time needs a snapshot of that time.

    Args:
        folder: `snapshots/` of the stage.
        every_images: interval in training images; `None`: no snapshots.
    """

    def __init__(self, folder: str, every_images: Count | None) -> None:
        self.folder, self.every = Path(folder), Every(every_images or sys.maxsize)
        self.newest: int | None = None  # images seen at the last snapshot of this process

    def on_train_start(self, trainer: Trainer, module: DiffusionModule) -> None:
        """Start the interval, and remove partial snapshots of a killed process."""
        self.every.start(module)
        if module.power_ema is not None and self.every.images == sys.maxsize:
            say("model.power_ema: snapshots=INTERVAL keeps the averages; the last alone gives few other lengths")
        if trainer.is_global_zero:
            for stale in self.folder.glob(".*.tmp"):
                shutil.rmtree(stale)

    def on_train_batch_end(self, trainer: Trainer, module: DiffusionModule, *_: object) -> None:
        """Write on rank 0 when due; the other ranks go on."""
        if self.every.due(trainer, module) and trainer.is_global_zero:
            self.take(module)

    def on_fit_end(self, trainer: Trainer, module: DiffusionModule) -> None:
        """Take the last snapshot of averages; Lightning also calls this if a resumed run has nothing left to train."""
        complete = trainer.global_step >= trainer.max_steps and trainer.is_global_zero
        if complete and module.power_ema is not None and self.newest != module.images_seen:
            self.take(module)

    def take(self, module: DiffusionModule) -> None:
        """Write now. The folder appears complete, and replaces a folder of the same name from before a resume."""
        target = self.folder / f"{module.images_seen:09d}"
        new, old = (target.with_name(f".{target.name}.{which}.tmp") for which in ("new", "old"))
        module.pipeline().save_pretrained(new)
        if module.power_ema is not None:
            module.power_ema.save(new / averages.FOLDER)
        for before in list(snapshots(self.folder).values())[-1:]:
            share(new, before)
        if target.is_dir():
            target.rename(old)
        new.rename(target)
        shutil.rmtree(old, ignore_errors=True)
        self.newest = module.images_seen


def share(folder: Path, other: Path) -> None:
    """Replace files of `folder` that equal those of `other` by hard links (by copies if the disk has no links)."""
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        twin = other / path.relative_to(folder)
        if twin.is_file() and filecmp.cmp(twin, path, shallow=False):
            place(twin, path)

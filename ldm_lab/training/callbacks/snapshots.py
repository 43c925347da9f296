"""Saves intermediate models for sampling, without the optimizer state."""

from __future__ import annotations

import filecmp
import shutil
import sys
from pathlib import Path

from lightning import Callback, Trainer

from ldm_lab.checkpoints.locate import snapshots
from ldm_lab.training.callbacks.every import Every
from ldm_lab.training.checkpoint_io import place
from ldm_lab.training.diffusion_module import DiffusionModule
from ldm_lab.utils.limits import Count


class Snapshots(Callback):
    """Saves, every so many images, the model with averaged weights as a pipeline folder: `<folder>/<images seen>/`.

    The weights are float32, exactly the values that validation uses: a checkpoint of the same step samples the same
    images, and `init=` loses no precision. Files that do not change, above all the first stage, are stored once, as
    hard links.

    Args:
        folder: `snapshots/` of the stage.
        every_images: interval in training images; `None`: no snapshots.
    """

    def __init__(self, folder: str, every_images: Count | None) -> None:
        self.folder, self.every = Path(folder), Every(every_images or sys.maxsize)

    def on_train_start(self, trainer: Trainer, module: DiffusionModule) -> None:
        """Start the interval, and remove partial snapshots of a killed process."""
        self.every.start(module)
        if trainer.is_global_zero:
            for stale in self.folder.glob(".*.tmp"):
                shutil.rmtree(stale)

    def on_train_batch_end(self, trainer: Trainer, module: DiffusionModule, *_: object) -> None:
        """Write on rank 0 when due; the other ranks go on."""
        if self.every.due(trainer, module) and trainer.is_global_zero:
            self.take(module)

    def take(self, module: DiffusionModule) -> None:
        """Write now. The folder appears complete, and replaces a folder of the same name from before a resume."""
        target = self.folder / f"{module.images_seen:09d}"
        new, old = (target.with_name(f".{target.name}.{which}.tmp") for which in ("new", "old"))
        module.pipeline().save_pretrained(new)
        for before in list(snapshots(self.folder).values())[-1:]:
            share(new, before)
        if target.is_dir():
            target.rename(old)
        new.rename(target)
        shutil.rmtree(old, ignore_errors=True)


def share(folder: Path, other: Path) -> None:
    """Replace files of `folder` that equal those of `other` by hard links (by copies if the disk has no links)."""
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        twin = other / path.relative_to(folder)
        if twin.is_file() and filecmp.cmp(twin, path, shallow=False):
            place(twin, path)

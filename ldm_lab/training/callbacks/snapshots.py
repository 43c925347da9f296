"""The model as it was on the way, small enough to keep."""

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
    """Every so many images, the model with averaged weights as a pipeline folder: `<folder>/<images seen>/`.

    The weights are float32, the very values that validation sees: a checkpoint of the same step samples the same
    images, and `init=` starts from nothing coarser. What does not change, the first stage above all, takes its place
    on disk once, as one file under many names.

    Args:
        folder: `snapshots/` of the stage.
        every_images: interval in training images; `None` takes none.
    """

    def __init__(self, folder: str, every_images: Count | None) -> None:
        self.folder, self.every = Path(folder), Every(every_images or sys.maxsize)

    def on_train_start(self, trainer: Trainer, module: DiffusionModule) -> None:
        """Begin to count."""
        self.every.start(module)
        if trainer.is_global_zero:
            for stale in self.folder.glob(".*.tmp"):  # what a killed process was writing
                shutil.rmtree(stale)

    def on_train_batch_end(self, trainer: Trainer, module: DiffusionModule, *_: object) -> None:
        """Write on rank 0 when due, while the others go on."""
        if self.every.due(trainer, module) and trainer.is_global_zero:
            self.take(module)

    def take(self, module: DiffusionModule) -> None:
        """Write now. The folder appears whole; one of the same images, from before a resume, is replaced."""
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
    """Let files of `folder` that are equal to those of `other` be these very files (copies, where disks lack links)."""
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        twin = other / path.relative_to(folder)
        if twin.is_file() and filecmp.cmp(twin, path, shallow=False):
            place(twin, path)

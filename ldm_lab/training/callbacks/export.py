"""The result of a stage, in the community's format."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from lightning import Callback, Trainer

from ldm_lab.pipeline import INDEX
from ldm_lab.training.diffusion_module import DiffusionModule
from ldm_lab.training.stage_module import StageModule


class Export(Callback):
    """When the last step is done, write `final/`; a diffusion stage makes its run a pipeline folder too.

    Args:
        stage_folder: the stage's folder; its parent is the run's.
    """

    def __init__(self, stage_folder: str) -> None:
        self.folder = Path(stage_folder)

    def on_train_end(self, trainer: Trainer, module: StageModule) -> None:
        """Export on rank 0 if training came to its end."""
        if trainer.global_step < trainer.max_steps or not trainer.is_global_zero:
            return
        if isinstance(module, DiffusionModule):
            module.pipeline().save_pretrained(self.folder / "final")
            publish(self.folder / "final", self.folder.parent)
        else:
            module.autoencoder.save_pretrained(self.folder / "final")


def publish(pipeline: Path, run: Path) -> None:
    """Make `run` the same pipeline folder as `pipeline`, by hard links where the disk has them; the index comes last."""
    files = sorted((p for p in pipeline.rglob("*") if p.is_file()), key=lambda p: p.name == INDEX)
    for source in files:
        target = run / source.relative_to(pipeline)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.tmp")
        temporary.unlink(missing_ok=True)
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
        os.replace(temporary, target)

"""Exports the result of a stage in the diffusers format."""

from __future__ import annotations

from pathlib import Path

from lightning import Callback, Trainer

from ldm_lab.checkpoints.checkpoint import fingerprint
from ldm_lab.training.checkpoint_io import place
from ldm_lab.training.diffusion_module import DiffusionModule
from ldm_lab.training.loggers.run_logger import run_loggers
from ldm_lab.training.stage_module import StageModule
from ldm_lab.utils.hub import INDEX


class Export(Callback):
    """Writes `final/` at the end of training; a diffusion stage also makes its run a pipeline folder.

    It acts in `on_fit_end`, which Lightning also calls if a resumed run has nothing left to train.

    Args:
        stage_folder: the stage's folder; its parent is the run's.
    """

    def __init__(self, stage_folder: str) -> None:
        self.folder = Path(stage_folder)

    def on_fit_end(self, trainer: Trainer, module: StageModule) -> None:
        """Export on rank 0 if training is complete."""
        if trainer.global_step < trainer.max_steps or not trainer.is_global_zero:
            return
        if isinstance(module, DiffusionModule):
            module.pipeline().save_pretrained(self.folder / "final")
            publish(self.folder / "final", self.folder.parent)
        else:
            module.autoencoder.save_pretrained(self.folder / "final")
        _, network = next(iter(module.exported().values()))
        where = {"folder": str(self.folder / "final"), "images_seen": module.images_seen}
        content = fingerprint(network)
        for logger in run_loggers(trainer):
            logger.log_artifact(module.stage, content, **where)


def publish(pipeline: Path, run: Path) -> None:
    """Link or copy the files of the folder `pipeline` into `run`, `model_index.json` last."""
    files = sorted((p for p in pipeline.rglob("*") if p.is_file()), key=lambda p: p.name == INDEX)
    for source in files:
        place(source, run / source.relative_to(pipeline))

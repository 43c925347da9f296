"""Runs the checks of `python -m ldm_lab doctor` during training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from torch import Tensor
from tqdm import tqdm

from ldm_lab.runs.diagnosis.checks import diagnose
from ldm_lab.runs.diagnosis.finding import BAD, OK, Finding, Readings
from ldm_lab.runs.diagnosis.folder import SHEET, sheet
from ldm_lab.runs.record import Curve, StageRecord
from ldm_lab.training.callbacks.episode import Episode
from ldm_lab.training.callbacks.pictures import show
from ldm_lab.training.stage_module import StageModule
from ldm_lab.utils.limits import Count
from ldm_lab.utils.shell import command


class Health(Callback):
    """Warns once about each training problem, and shows the first training images.

    After each validation the checks of `runs.diagnosis` read the newest metrics. A check that fails `patience` times in
    a row prints a warning, and may warn again after it has passed in between. `CodebookUse` and `DiscriminatorHealth`
    check codebook and discriminator instead, as they see every code and every step.

    The picture `data` shows the first training images as the network gets them, cropped and flipped; with cached
    latents, as the first stage decodes them.

    Args:
        folder: the stage's folder.
        images: maximum number of images on the picture, taken from the first step on rank 0.
        patience: validations in a row.
    """

    ELSEWHERE = ("codebook", "discriminator")
    KEPT = 64  # validations, for checks that compare with earlier ones

    def __init__(self, folder: str, images: Count = 36, patience: Count = 3) -> None:
        self.stage_folder, self.images, self.patience = Path(folder), images, patience
        self.curves: dict[str, Curve] = {}
        self.episodes: dict[str, Episode] = {}
        self._seen: list[Tensor] = []
        self._config: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        """The metrics of the newest validations, and the active warnings."""
        episodes = {check: episode.state_dict() for check, episode in self.episodes.items()}
        return {"curves": {name: list(map(list, curve)) for name, curve in self.curves.items()}, "episodes": episodes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state, and keep the newer metrics of a validation that a resumed run has made up before."""
        for name, curve in state["curves"].items():
            self.curves[name] = sorted({**dict(map(tuple, curve)), **dict(self.curves.get(name, []))}.items())
        for check, episode in state["episodes"].items():
            self.episodes.setdefault(check, Episode(self.patience)).load_state_dict(episode)

    def on_train_batch_start(
        self, trainer: Trainer, module: StageModule, batch: dict[str, Tensor], batch_idx: int
    ) -> None:
        """Collect the images of the first step and show them."""
        size = trainer.datamodule.global_batch_size
        if module.images_seen >= size or not trainer.is_global_zero:
            return
        self._seen += as_images(module, batch)[: self.images - len(self._seen)]  # (b, C, H, W) -> b of (C, H, W)
        if module.images_seen + len(batch["index"]) * trainer.world_size >= size:
            show(trainer, module, self.stage_folder / "samples", SHEET, torch.stack(self._seen))
            self._seen = []
            self._note(module, sheet(StageRecord(self.stage_folder, module.stage)), patience=1)

    def on_validation_end(self, trainer: Trainer, module: StageModule) -> None:
        """Record the metrics and run the checks."""
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        for name, value in trainer.callback_metrics.items():
            if "/" in name:
                curve = {**dict(self.curves.get(name, [])), module.images_seen: float(value)}
                self.curves[name] = sorted(curve.items())[-self.KEPT :]
        self._config = self._config or StageRecord(self.stage_folder, module.stage).config
        for finding in diagnose(Readings(module.stage, self._config, self.curves)):
            if finding.check not in self.ELSEWHERE:
                self._note(module, finding, self.patience)

    def _note(self, module: StageModule, finding: Finding, patience: int) -> None:
        """Record a finding; print it after `patience` bad validations in a row."""
        episode = self.episodes.setdefault(finding.check, Episode(patience))
        if episode.note(module.images_seen, bad=finding.verdict == BAD, good=finding.verdict == OK):
            tqdm.write(
                f"warning: {module.stage}, since {episode.since:,} images: {finding}."
                f" {command('-m', 'ldm_lab', 'doctor', str(self.stage_folder))} says more"
            )


@torch.no_grad()
def as_images(module: StageModule, batch: dict[str, Tensor]) -> Tensor:
    """The images of a training batch, `(b, C, H, W)`, about in [-1, 1]; cached latents are decoded."""
    if "image" in batch:
        return batch["image"]
    latents = module.autoencoder.from_moments(batch["moments"].float())  # (b, C, h, w)
    return module.autoencoder.decode(latents).sample

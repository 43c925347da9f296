"""Which files `data.on_error=skip` has passed over."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from tqdm import tqdm

from ldm_lab.training.stage_module import StageModule
from ldm_lab.utils.writing import replacing


class SkippedFiles(Callback):
    """Says at once that a file was passed over, and lists all of them in `skipped_files.txt`, a line each.

    The list is brought up to date at each checkpoint, at each validation (with `data/skipped_files`, how many they
    are) and at the end. A resumed run adds to it. With `on_error=raise` there is nothing to report, and nothing is.

    Args:
        folder: the stage's folder.
    """

    def __init__(self, folder: str) -> None:
        self.path = Path(folder) / "skipped_files.txt"
        self.lines: dict[str, None] = {}  # a set that keeps its order
        self.skipping = False  # whether the data set is one that skips
        self.said = False

    def on_fit_start(self, trainer: Trainer, module: StageModule) -> None:
        """Take up the list of an earlier start."""
        if trainer.is_global_zero and self.path.is_file():
            self.lines = dict.fromkeys(self.path.read_text(encoding="utf-8", errors="surrogateescape").splitlines())

    def on_train_batch_start(self, trainer: Trainer, module: StageModule, batch: dict, batch_idx: int) -> None:
        """Look at what comes along with the images."""
        self._look(trainer, batch)

    def on_validation_batch_start(
        self, trainer: Trainer, module: StageModule, batch: dict, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Held-out images likewise."""
        self._look(trainer, batch)

    def _look(self, trainer: Trainer, batch: dict[str, Any]) -> None:
        self.skipping |= "skipped" in batch
        self._add(trainer, (line for lines in batch.get("skipped", ()) for line in lines.split("\n") if line))

    def _add(self, trainer: Trainer, lines: Iterable[str]) -> None:
        new = dict.fromkeys(line for line in lines if line not in self.lines)
        self.lines |= new
        if new and trainer.is_global_zero and not self.said:
            self.said = True
            tqdm.write(f"skipped: {next(iter(new))} (others are only listed, in {self.path})")

    def on_validation_epoch_end(self, trainer: Trainer, module: StageModule) -> None:
        """Bring the list up to date and log its length."""
        self._write(trainer)
        if self.skipping:
            module.log("data/skipped_files", float(len(self.lines)), batch_size=1, sync_dist=True)

    def on_save_checkpoint(self, trainer: Trainer, module: StageModule, state: dict[str, Any]) -> None:
        """What was skipped before a checkpoint is not met again after it."""
        self._write(trainer)

    def on_train_end(self, trainer: Trainer, module: StageModule) -> None:
        """Say how many there were."""
        self._write(trainer)
        if trainer.is_global_zero and self.lines:
            tqdm.write(f"{len(self.lines):,} file(s) could not be decoded and were skipped: {self.path}")

    def _write(self, trainer: Trainer) -> None:
        """Put the ranks' lists together, and write them on rank 0."""
        if not self.skipping:
            return
        if trainer.world_size > 1:
            lists: list[list[str]] = [[] for _ in range(trainer.world_size)]
            torch.distributed.all_gather_object(lists, list(self.lines))
            self._add(trainer, (line for lines in lists for line in lines))
        if trainer.is_global_zero and self.lines:
            text = "".join(f"{line}\n" for line in self.lines)
            with replacing(self.path) as temporary:
                temporary.write_text(text, encoding="utf-8", errors="surrogateescape")

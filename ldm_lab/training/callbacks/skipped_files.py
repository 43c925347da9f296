"""Reports the files that `data.on_error=skip` has skipped."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning import Callback, Trainer
from tqdm import tqdm

from ldm_lab.training.stage_module import StageModule
from ldm_lab.training.statistics import gathered
from ldm_lab.utils.writing import replacing


class SkippedFiles(Callback):
    """Prints the first skipped file at once, and lists all skipped files in `skipped_files.txt`, one per line.

    The list is updated at each checkpoint, at each validation (which logs `data/skipped_files`, their number) and at
    the end. A resumed run adds to the list. With `on_error=raise` no file is skipped, and nothing is reported.

    Args:
        folder: the stage's folder.
    """

    def __init__(self, folder: str) -> None:
        self.path = Path(folder) / "skipped_files.txt"
        self.lines: dict[str, None] = {}  # a set that keeps its order
        self.skipping = False  # whether the data set skips files
        self.said = False

    def on_fit_start(self, trainer: Trainer, module: StageModule) -> None:
        """Read the list of earlier starts."""
        if trainer.is_global_zero and self.path.is_file():
            self.lines = dict.fromkeys(self.path.read_text(encoding="utf-8", errors="surrogateescape").splitlines())

    def on_train_batch_start(self, trainer: Trainer, module: StageModule, batch: dict, batch_idx: int) -> None:
        """Collect the skipped files of a training batch."""
        self._look(trainer, batch)

    def on_validation_batch_start(
        self, trainer: Trainer, module: StageModule, batch: dict, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Collect the skipped files of a held-out batch."""
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
        """Write the list and log its length."""
        self._write(trainer)
        if self.skipping:
            module.log("data/skipped_files", float(len(self.lines)), batch_size=1, sync_dist=True)

    def on_save_checkpoint(self, trainer: Trainer, module: StageModule, state: dict[str, Any]) -> None:
        """Write the list, as a resumed run does not meet these files again."""
        self._write(trainer)

    def on_train_end(self, trainer: Trainer, module: StageModule) -> None:
        """Write the list and print the number of skipped files."""
        self._write(trainer)
        if trainer.is_global_zero and self.lines:
            tqdm.write(f"{len(self.lines):,} file(s) could not be decoded and were skipped: {self.path}")

    def _write(self, trainer: Trainer) -> None:
        """Merge the lists of all ranks, and write the result on rank 0."""
        if not self.skipping:
            return
        self._add(trainer, gathered(trainer, list(self.lines)))
        if trainer.is_global_zero and self.lines:
            text = "".join(f"{line}\n" for line in self.lines)
            with replacing(self.path) as temporary:
                temporary.write_text(text, encoding="utf-8", errors="surrogateescape")

"""`metrics.csv`: one row per images seen, kept over resumes."""

from __future__ import annotations

import csv
import time
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

from ldm_lab.runs.record import AXIS, read_metrics
from ldm_lab.training.loggers.run_logger import RunLogger
from ldm_lab.utils.writing import replacing


class MetricsCSV(RunLogger):
    """Appends metrics to `folder/metrics.csv`, sorted by images seen, one row for each value of it.

    Lightning's own CSV logger deletes the file of an earlier start; here a resumed run replaces only the
    rows that it repeats.
    """

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.path = Path(folder) / "metrics.csv"
        self._rows: dict[int, dict[str, Any]] | None = None
        self._unsaved = False
        self._next_save = 0.0

    @property
    def name(self) -> str:
        """Unused: the folder says it."""
        return "csv"

    @property
    def version(self) -> str:
        """Unused: the folder says it."""
        return ""

    @property
    @rank_zero_experiment
    def experiment(self) -> dict[int, dict[str, Any]]:
        """The rows by images seen, read from the file at first."""
        if self._rows is None:
            self._rows = {}
            if self.path.is_file():
                self._rows = read_metrics(self.path)
        return self._rows

    @rank_zero_only
    def log_hyperparams(self, *_: Any, **__: Any) -> None:  # noqa: ANN401
        """Nothing: `config.yaml` holds them."""

    @rank_zero_only
    def forget_after(self, images_seen: int) -> None:
        """Drop the rows of what a resumed run is about to do again."""
        rows = self.experiment
        for key in [key for key in rows if key > images_seen]:
            del rows[key]

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Add to the row of these images seen."""
        metrics = {key: value for key, value in metrics.items() if key != "epoch"}
        images_seen = metrics.pop(AXIS, None)
        if images_seen is None:
            return
        row = self.experiment.setdefault(int(images_seen), {AXIS: int(images_seen)})
        row.update({key: f"{value:.6g}" for key, value in metrics.items()})
        self._unsaved = True

    @rank_zero_only
    def save(self) -> None:
        """Write the file; but in a long run, whose file is large, not after each row: at most 1/20 of the time."""
        if time.monotonic() > self._next_save:
            self.flush()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write what is left."""
        self.flush()

    @rank_zero_only
    def flush(self) -> None:
        """Write the file now, whole or not at all."""
        if not self._unsaved:
            return
        started = time.monotonic()
        columns = sorted({key for row in self.experiment.values() for key in row} - {AXIS})
        with replacing(self.path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [AXIS, *columns])
            writer.writeheader()
            writer.writerows(self.experiment[key] for key in sorted(self.experiment))
        self._unsaved = False
        self._next_save = time.monotonic() + 20 * (time.monotonic() - started)

"""CSV logger: `metrics.csv`, which a resumed run continues."""

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
    """Writes metrics to `folder/metrics.csv`, one row for each number of images seen, sorted by that number.

    Lightning's own CSV logger deletes the file of an earlier start; this logger replaces only the rows
    that a resumed run repeats.
    """

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.path = Path(folder) / "metrics.csv"
        self._rows: dict[int, dict[str, Any]] | None = None
        self._unsaved = False
        self._next_save = 0.0

    @property
    def name(self) -> str:
        """Unused, as the folder identifies the run."""
        return "csv"

    @property
    def version(self) -> str:
        """Unused, as the folder identifies the run."""
        return ""

    @property
    @rank_zero_experiment
    def experiment(self) -> dict[int, dict[str, Any]]:
        """Images seen -> row, read from the file on first use."""
        if self._rows is None:
            self._rows = {}
            if self.path.is_file():
                self._rows = read_metrics(self.path)
        return self._rows

    @rank_zero_only
    def log_hyperparams(self, *_: Any, **__: Any) -> None:  # noqa: ANN401
        """Do nothing, as `config.yaml` holds the hyperparameters."""

    @rank_zero_only
    def forget_after(self, images_seen: int) -> None:
        """Drop the rows that a resumed run will log again."""
        rows = self.experiment
        for key in [key for key in rows if key > images_seen]:
            del rows[key]

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Add metrics to the row of their number of images seen."""
        metrics = {key: value for key, value in metrics.items() if key != "epoch"}
        images_seen = metrics.pop(AXIS, None)
        if images_seen is None:
            return
        row = self.experiment.setdefault(int(images_seen), {AXIS: int(images_seen)})
        row.update({key: f"{value:.6g}" for key, value in metrics.items()})
        self._unsaved = True

    @rank_zero_only
    def save(self) -> None:
        """Write the file, but spend at most 1/20 of the time on it, as a long run has a large file."""
        if time.monotonic() > self._next_save:
            self.flush()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write the remaining rows."""
        self.flush()

    @rank_zero_only
    def flush(self) -> None:
        """Write the file now, atomically."""
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

"""Logs training throughput."""

from __future__ import annotations

import time
from typing import Any

from lightning import Callback, Trainer

from ldm_lab.training.stage_module import StageModule


class Throughput(Callback):
    """Logs `perf/images_per_second` over all ranks, without the time of validation."""

    def __init__(self) -> None:
        self._started = 0.0
        self._images = 0

    def on_train_batch_start(self, trainer: Trainer, module: StageModule, batch: dict, batch_idx: int) -> None:
        """Start a window at the first step and after each validation."""
        if not self._started:
            self._started, self._images = time.perf_counter(), module.images_seen

    def on_train_batch_end(self, trainer: Trainer, module: StageModule, *_: Any) -> None:  # noqa: ANN401
        """Log the mean over the window since the last validation."""
        seconds = time.perf_counter() - self._started
        module.log("perf/images_per_second", (module.images_seen - self._images) / seconds, batch_size=1)

    def on_validation_start(self, trainer: Trainer, module: StageModule) -> None:
        """End the window."""
        self._started = 0.0

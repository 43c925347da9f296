"""Logs the device time and peak memory of a run."""

from __future__ import annotations

import time
from typing import Any

from lightning import Callback, Trainer

from ldm_lab.training.planning import memory
from ldm_lab.training.stage_module import StageModule


class DeviceUse(Callback):
    """Logs `perf/device_hours` in each row, and `perf/memory_gb` at each validation.

    Hours are summed over all devices since the run began, validation and previews included. A resumed run adds its own
    hours to those in the checkpoint. Memory is the peak of any one device since this start, in GB of 2^30 bytes: on a
    GPU the memory of tensors, on a CPU the memory of the process.
    """

    def __init__(self) -> None:
        self._before = 0.0  # device seconds of earlier starts
        self._devices = 0
        self._since: float | None = None  # None: training has not begun

    @property
    def seconds(self) -> float:
        """Device seconds so far."""
        return self._before + (self._devices * (time.monotonic() - self._since) if self._since is not None else 0.0)

    def state_dict(self) -> dict[str, Any]:
        """Device seconds so far, for the checkpoint."""
        return {"device_seconds": self.seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the device seconds of earlier starts."""
        self._before = float(state["device_seconds"])

    def on_train_start(self, trainer: Trainer, module: StageModule) -> None:
        """Start the clock."""
        self._devices, self._since = trainer.world_size, time.monotonic()
        memory.reset_peak(module.device)

    def on_train_batch_end(self, trainer: Trainer, module: StageModule, *_: object) -> None:
        """Log the device hours."""
        module.log("perf/device_hours", self.seconds / 3600, batch_size=1)

    def on_validation_epoch_end(self, trainer: Trainer, module: StageModule) -> None:
        """Log memory and hours with the validation metrics; no hours if a resumed run makes up a missed validation."""
        peak = memory.peak(module.device) / memory.UNITS["GB"]
        module.log("perf/memory_gb", peak, batch_size=1, sync_dist=True, reduce_fx="max")
        if self._since is not None:
            module.log("perf/device_hours", self.seconds / 3600, batch_size=1, sync_dist=True)

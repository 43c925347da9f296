"""What a run takes of the machines: memory and time."""

from __future__ import annotations

import time
from typing import Any

from lightning import Callback, Trainer

from ldm_lab.training.planning import memory
from ldm_lab.training.stage_module import StageModule


class DeviceUse(Callback):
    """Logs `perf/device_hours` in each row, and `perf/memory_gb` at each validation.

    Hours are those of all devices together since the run began, validation and previews included: of a resumed run,
    those that led to the state it goes on from, and its own. Memory is the most that one of the devices had in use
    since this start: of a GPU by tensors, of a CPU by the process; in GB of 2^30 bytes.
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
        """The time so far."""
        return {"device_seconds": self.seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._before = float(state["device_seconds"])

    def on_train_start(self, trainer: Trainer, module: StageModule) -> None:
        """Start the clock."""
        self._devices, self._since = trainer.world_size, time.monotonic()
        memory.reset_peak(module.device)

    def on_train_batch_end(self, trainer: Trainer, module: StageModule, *_: object) -> None:
        """Log the time."""
        module.log("perf/device_hours", self.seconds / 3600, batch_size=1)

    def on_validation_epoch_end(self, trainer: Trainer, module: StageModule) -> None:
        """Log both beside the metrics of a validation; for one that a resumed run owes, the time is there already."""
        peak = memory.peak(module.device) / memory.UNITS["GB"]
        module.log("perf/memory_gb", peak, batch_size=1, sync_dist=True, reduce_fx="max")
        if self._since is not None:
            module.log("perf/device_hours", self.seconds / 3600, batch_size=1, sync_dist=True)

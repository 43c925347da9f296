"""Lightning's trainer, and what ours adds to it."""

from __future__ import annotations

from typing import Any

import lightning
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from ldm_lab.training.launcher import Launcher


class Trainer(lightning.Trainer):
    """`lightning.Trainer`, whose processes end together (see `Launcher`), whatever the strategy.

    Args:
        on_nan: what to do where a loss or gradient is not finite, "stop" or "skip" (see `NotFinite`).
        **settings: see `lightning.Trainer`.

    Raises:
        ValueError: `on_nan` is something else.
    """

    def __init__(self, on_nan: str = "stop", **settings: Any) -> None:  # noqa: ANN401
        if on_nan not in ("stop", "skip"):
            raise ValueError(f"trainer.on_nan={on_nan}: must be stop or skip")
        self.on_nan = on_nan
        super().__init__(**settings)
        given = self.strategy.launcher
        if isinstance(given, _SubprocessScriptLauncher):
            self.strategy._launcher = Launcher(given.cluster_environment, given.num_processes, given.num_nodes)

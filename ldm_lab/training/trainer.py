"""Lightning's trainer with a few more settings."""

from __future__ import annotations

from typing import Any

import lightning
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from ldm_lab.training.launcher import Launcher
from ldm_lab.utils import float32
from ldm_lab.utils.errors import UserError, one_line


class Trainer(lightning.Trainer):
    """`lightning.Trainer` whose processes end together (see `Launcher`), whatever the strategy.

    Args:
        float32_matmul_precision: how a CUDA device multiplies float32 numbers in matrix products and convolutions:
            "highest" with all bits, "high" and "medium" in TF32 (see `float32.allow`). It has no effect on CPUs.
        on_nan: reaction to a loss or gradient that is not finite, "stop" or "skip" (see `NotFinite`).
        **settings: see `lightning.Trainer`.

    Raises:
        UserError: a setting is unknown or invalid.
    """

    def __init__(self, on_nan: str = "stop", float32_matmul_precision: str = "high", **settings: Any) -> None:  # noqa: ANN401
        if on_nan not in ("stop", "skip"):
            raise UserError(f"trainer.on_nan={on_nan}: must be stop or skip")
        if float32_matmul_precision not in float32.PRECISIONS:
            choices = ", ".join(float32.PRECISIONS)
            raise UserError(f"trainer.float32_matmul_precision={float32_matmul_precision}: must be one of {choices}")
        self.on_nan = on_nan
        try:
            super().__init__(**settings)
        except (MisconfigurationException, TypeError, ValueError) as error:  # Lightning raises any of these
            raise UserError(one_line(error)) from error
        if self.strategy.root_device.type == "cuda":
            float32.allow(float32_matmul_precision)
        given = self.strategy.launcher
        if isinstance(given, _SubprocessScriptLauncher):
            # `launcher` cannot be set, and the strategy may be any of Lightning's or of a user.
            self.strategy._launcher = Launcher(given.cluster_environment, given.num_processes, given.num_nodes)

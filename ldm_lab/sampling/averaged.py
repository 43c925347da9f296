"""Loads the pipeline to sample from: with the usual average of the UNet's weights, or with one of a chosen length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ldm_lab.checkpoints import averages
from ldm_lab.checkpoints.locate import State
from ldm_lab.pipeline import LDMPipeline


def load(
    state: State,
    length: float | None,
    key: str = "ema",
    plugins: Sequence[str] = (),
    **reading: Any,  # noqa: ANN401
) -> LDMPipeline:
    """Load a pipeline.

    Args:
        state: a state; with a length, a snapshot (see `averages.snapshot_of`).
        length: sigma_rel of the average; None: the usual average.
        key: the user's setting, for messages.
        plugins: packages whose classes the files may name.
        reading: see `checkpoints.parts.read`.

    Raises:
        UserError: the snapshots do not give an average of this length.
        LoadError: a file is missing or corrupt.
    """
    if length is not None:
        unet = averages.unet(state, length, LDMPipeline.classes["unet"], plugins, f"{key}={length}")
        reading["given"] = {"unet": unet}
    return LDMPipeline.from_file_or_folder(state.path, plugins=plugins, **reading)

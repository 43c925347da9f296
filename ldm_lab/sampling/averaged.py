"""Replaces the UNet of a snapshot by one whose weights are averaged with a chosen length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ldm_lab.checkpoints import averages
from ldm_lab.checkpoints.locate import State
from ldm_lab.pipeline import LDMPipeline


def given(state: State, length: float | None, key: str, plugins: Sequence[str] = ()) -> dict[str, Any]:
    """The argument `given` of `LDMPipeline.from_file_or_folder`: the averaged UNet, or nothing without a length.

    Args:
        state: a state; with a length, a snapshot (see `averages.snapshot_of`).
        length: sigma_rel of the average; None: the usual average.
        key: the user's setting, for messages.
        plugins: packages whose classes the files may name.

    Raises:
        UserError: the snapshots do not give an average of this length.
        LoadError: a file is missing or corrupt.
    """
    if length is None:
        return {}
    return {"unet": averages.unet(state, length, LDMPipeline.classes["unet"], plugins, f"{key}={length}")}

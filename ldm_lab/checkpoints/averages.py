"""Finds the power-function averages in a run's snapshots, and combines them to an average of any length.

A snapshot of a run with `model.power_ema=[0.05,0.1]` has a UNet folder `power_ema/<length>/` for each length. For the
mathematics see `utils.power_profiles`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from ldm_lab.checkpoints.checkpoint import class_of
from ldm_lab.checkpoints.locate import SNAPSHOTS, State, snapshots, stage_folder
from ldm_lab.utils import power_profiles
from ldm_lab.utils.errors import UserError
from ldm_lab.utils.hub import CONFIG
from ldm_lab.utils.lengths import short
from ldm_lab.utils.power_profiles import LONGEST, Fit, Profile
from ldm_lab.utils.reading import read_json

FOLDER = "power_ema"  # in a snapshot
LARGEST_RESIDUAL = 0.1
REMEDY = "train.py model.power_ema=[0.05,0.1] snapshots=INTERVAL keeps them"


class Average(NamedTuple):
    """A stored average.

    Attributes:
        profile: its profile.
        folder: the folder of its UNet.
    """

    profile: Profile
    folder: Path


def snapshot_of(state: State, key: str) -> State:
    """The snapshot with averages that a state stands for: the state itself, or the newest snapshot of its run.

    Args:
        state: see `locate.find`.
        key: the user's setting with its value, for messages.

    Raises:
        UserError: there is no such snapshot.
    """
    if state.path.parent.name == SNAPSHOTS:
        taken = {state.images_seen: state.path}
    else:
        taken = snapshots(stage_folder(state.source, "diffusion") / SNAPSHOTS) if state.source.is_dir() else {}
    found = {images: path for images, path in taken.items() if (path / FOLDER).is_dir()}
    if not found:
        why = "its snapshots have no averages to combine" if taken else "it is no run with snapshots"
        raise UserError(f"{key}: {state.source}: {why}; {REMEDY}")
    newest = max(found)
    return replace(state, path=found[newest], images_seen=newest)


def stored(snapshot: State) -> list[Average]:
    """The averages in a snapshot and in the earlier ones of its run, oldest first."""
    found = []
    for images, folder in snapshots(snapshot.path.parent).items():
        if images <= snapshot.images_seen:
            named = {length_of(path.name): path for path in sorted((folder / FOLDER).glob("*"))}
            found += [Average(Profile(length, images), path) for length, path in named.items() if length]
    return found


def length_of(name: str) -> float | None:
    """The length that a folder's name says; `None` for other names."""
    try:
        return length if 0 < (length := float(name)) < LONGEST else None
    except ValueError:
        return None


def fit(averages: Sequence[Average], wanted: Profile, key: str) -> Fit:
    """The combination of averages for a profile.

    Raises:
        UserError: there is no such profile, or the averages do not give it to within `LARGEST_RESIDUAL`; the message
            begins with `key`.
    """
    power_profiles.check(wanted.length, key)
    profiles = [average.profile for average in averages]
    found = power_profiles.fit(profiles, wanted)
    if found.residual > LARGEST_RESIDUAL:
        lengths = [*{profile.length for profile in profiles}, *np.geomspace(0.005, 0.28, 100).round(3).tolist()]
        fits = {length: power_profiles.fit(profiles, Profile(length, wanted.time)) for length in lengths}
        good = [length for length, other in fits.items() if other.residual <= LARGEST_RESIDUAL]
        raise UserError(
            f"{key}: the snapshots up to {short(int(wanted.time))} images give this length with an error of"
            f" {found.residual:.0%}; take {min(good, key=lambda length: abs(length - wanted.length))}, or train with"
            " more snapshots (snapshots=)"
        )
    return found


def combine(
    averages: Sequence[Average], weights: Sequence[float], kinds: Sequence[type], plugins: Sequence[str]
) -> Any:  # noqa: ANN401
    """The UNet whose tensors are the weighted sum of those of the averages; averages with weight 0 are not read.

    Args:
        averages: averages, oldest first.
        weights: their coefficients.
        kinds: allowed classes of this package.
        plugins: packages whose classes the configs may name too.

    Raises:
        LoadError: a file is missing, corrupt, or of another architecture than the newest.
    """
    total: dict[str, Tensor] = {}
    config = read_json(averages[-1].folder / CONFIG)
    origin = str(averages[-1].folder)
    kind = class_of(config, kinds, plugins, origin)
    for average, weight in zip(averages, weights, strict=True):
        if weight:
            add(total, kind.from_pretrained(average.folder).exported_state_dict(), weight)
    # In float64, as coefficients of both signs cancel.
    tensors = {name: value.float() if value.is_floating_point() else value for name, value in total.items()}
    return kind.from_tensors(config, tensors, origin)


def add(total: dict[str, Tensor], tensors: dict[str, Tensor], weight: float) -> None:
    """Add `weight` times the floating-point tensors to `total`, in float64; others replace those there."""
    for name, value in tensors.items():
        if value.is_floating_point():
            value = weight * value.detach().double()
            value = value.add_(total[name]) if name in total else value
        total[name] = value


def unet(snapshot: State, length: float, kinds: Sequence[type], plugins: Sequence[str], key: str) -> Any:  # noqa: ANN401
    """The UNet averaged with a length up to a snapshot (see `snapshot_of`, `fit` and `combine`)."""
    averages = stored(snapshot)
    weights = fit(averages, Profile(length, snapshot.images_seen), key).weights
    return combine(averages, weights, kinds, plugins)

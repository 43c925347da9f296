"""Single values of runs, each with its file and row."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from ldm_lab.runs.metrics import direction
from ldm_lab.runs.record import Curve, Evaluation, StageRecord


@dataclass(frozen=True)
class Value:
    """A number and its origin.

    Attributes:
        value: the number; may be NaN.
        file: file that holds the number.
        images_seen: row of `metrics.csv`, or training images of the evaluated model; None: unknown.
        low: lower end of its interval, if known.
        high: upper end of its interval, if known.
    """

    value: float
    file: Path
    images_seen: int | None
    low: float | None = None
    high: float | None = None


def measured(record: StageRecord, metric: str, images_seen: int | None = None) -> Value:
    """The value in `metrics.csv` at a number of images, or in the last row with the metric."""
    curve = record.curves[metric]
    images_seen = curve[-1][0] if images_seen is None else images_seen
    return Value(dict(curve)[images_seen], record.folder / "metrics.csv", images_seen)


def best(record: StageRecord, metric: str) -> Value | None:
    """The best value of a curve; None if the metric has no better direction."""
    file = record.folder / "metrics.csv"
    return best_of([Value(value, file, images) for images, value in record.curves[metric]], direction(metric))


def best_of(values: Iterable[Value], better: str | None) -> Value | None:
    """The first of the best finite values; None without finite values or direction."""
    finite = [value for value in values if math.isfinite(value.value)]
    if not better or not finite:
        return None
    choose: Callable[..., Value] = min if better == "lower" else max
    return choose(finite, key=lambda value: value.value)


def evaluated(evaluation: Evaluation, name: str) -> Value:
    """An evaluation's value of the metric `name`, such as `fid`."""
    found, seen = evaluation.metrics[name], evaluation.content.get("images_seen")
    low, high = (found.get(end) if isinstance(found.get(end), (int, float)) else None for end in ("low", "high"))
    return Value(float(found["value"]), evaluation.path, seen if isinstance(seen, int) else None, low, high)


def thinned(curve: Curve, most: int) -> Curve:
    """A curve with at most `most` points: keeps minimum and maximum of each part, so that no spike is lost."""
    if len(curve) <= most:
        return curve
    parts, kept = max(1, most // 2 - 1), [curve[0], curve[-1]]
    for part in range(parts):
        piece = curve[part * len(curve) // parts : (part + 1) * len(curve) // parts]
        finite = [point for point in piece if math.isfinite(point[1])] or piece
        kept += [min(finite, key=lambda point: point[1]), max(finite, key=lambda point: point[1])]
    return sorted(dict(kept).items())

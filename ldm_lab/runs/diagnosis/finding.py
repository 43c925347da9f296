"""Input and result of a check."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, replace
from typing import Any

from ldm_lab.runs.record import Curve, StageRecord

OK, LOOK, BAD, UNKNOWN = "ok", "look", "bad", "unknown"
# Every training begins badly. A bad value counts after this many images (by then the demo has learned most) ...
EARLY = 10_000
HIGHER = ("psnr", "hues_kept")  # metrics of which the higher value is the better one
LEARNING = 0.002  # ... and only if the metric has improved by less than this fraction of its first value


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        check: name of the check: its subject in a few words.
        verdict: `OK`, `LOOK` (unusual), `BAD`, or `UNKNOWN` (no data).
        measured: the value in words, or the missing data.
        healthy: the range of healthy runs.
        advice: what to change, as key=value if possible.
    """

    check: str
    verdict: str
    measured: str
    healthy: str = ""
    advice: str = ""

    def __str__(self) -> str:
        what = f"{self.check}: {self.measured}"
        if self.verdict == UNKNOWN:
            return what
        healthy = f" (healthy: {self.healthy})" if self.healthy else ""
        return what + healthy + (f". {self.advice}" if self.verdict != OK and self.advice else "")


@dataclass(frozen=True)
class Healthy:
    """The range of healthy runs, and a wider range outside which a run is bad.

    Attributes:
        low: lower end of the healthy range.
        high: upper end of the healthy range.
        bad_below: smaller values are bad.
        bad_above: larger values are bad.
    """

    low: float = -math.inf
    high: float = math.inf
    bad_below: float = -math.inf
    bad_above: float = math.inf

    def verdict(self, value: float) -> str:
        """`OK`, `LOOK` or `BAD`; NaN is bad."""
        if not self.bad_below <= value <= self.bad_above:
            return BAD
        return OK if self.low <= value <= self.high else LOOK

    def __str__(self) -> str:
        if math.isinf(self.low):
            return f"at most {self.high:g}"
        return f"at least {self.low:g}" if math.isinf(self.high) else f"{self.low:g} to {self.high:g}"


@dataclass(frozen=True)
class Readings:
    """The metrics of a stage so far.

    Attributes:
        stage: "autoencoder" or "diffusion".
        config: the stage's resolved config.
        curves: metric -> values over images seen.
    """

    stage: str
    config: dict[str, Any]
    curves: dict[str, Curve]

    @classmethod
    def of(cls, record: StageRecord) -> Readings:
        """The readings of a stage's record."""
        return cls(record.stage, record.config, record.curves)

    @property
    def images_seen(self) -> int:
        """Images seen at the newest value."""
        return max((curve[-1][0] for curve in self.curves.values() if curve), default=0)

    def values(self, metric: str) -> list[float]:
        """The values of a metric, oldest first; empty if it was not logged."""
        return [value for _, value in self.curves.get(metric, [])]

    def recent(self, metric: str) -> float:
        """Median of the newest tenth of a metric's values (at least one), as single batches vary; NaN if one is NaN."""
        return median(tail(self.values(metric), 0.1))


def unless_learning(readings: Readings, metric: str, finding: Finding) -> Finding:
    """Turn `BAD` into `LOOK` early in training, or if the metric has improved since its first value."""
    first, newest = readings.values(metric)[0], readings.values(metric)[-1]
    gain = (newest - first) if metric.endswith(HIGHER) else (first - newest)
    may_come = readings.images_seen < EARLY or gain > LEARNING * abs(first)
    return replace(finding, verdict=LOOK) if may_come and finding.verdict == BAD else finding


def tail(values: list[float], part: float) -> list[float]:
    """The last values, a fraction `part` of all, and at least one."""
    return values[-max(1, int(len(values) * part)) :]


def median(values: list[float]) -> float:
    """The median; NaN if a value is NaN."""
    return math.nan if any(map(math.isnan, values)) else statistics.median(values)


def missing(check: str, what: str, why: str = "was not logged") -> Finding:
    """The finding of a check that has no data."""
    return Finding(check, UNKNOWN, f"{what} {why}")


def in_range(check: str, value: float, words: str, healthy: Healthy, advice: str) -> Finding:
    """The finding for a value; `words` is the format string that shows it."""
    return Finding(check, healthy.verdict(value), words.format(value), str(healthy), advice)

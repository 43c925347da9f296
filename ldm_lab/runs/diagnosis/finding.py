"""What a check takes, and what it finds."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, replace
from typing import Any

from ldm_lab.runs.record import Curve, StageRecord

OK, LOOK, BAD, UNKNOWN = "ok", "look", "bad", "unknown"
# Every training begins badly: so many images must be seen (the demo has learned most after as many) ...
EARLY = 10_000
LEARNING = 0.002  # ... and less than this part of the first value must be gained, before that is called broken


@dataclass(frozen=True)
class Finding:
    """The answer to one question.

    Attributes:
        check: what was looked at, in a few words; also its name.
        verdict: `OK`, `LOOK` (unusual), `BAD`, or `UNKNOWN` (nothing to look at).
        measured: the value in words, or what is missing.
        healthy: what is seen in healthy runs.
        advice: what to change, as key=value where there is one.
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
    """The range of healthy runs, and another one outside which something is broken.

    Attributes:
        low: lower end.
        high: upper end.
        bad_below: lower end of what may still be in order.
        bad_above: upper end.
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
    """What a stage has measured so far.

    Attributes:
        stage: "autoencoder" or "diffusion".
        config: its settings, resolved.
        curves: metric -> values over images seen.
    """

    stage: str
    config: dict[str, Any]
    curves: dict[str, Curve]

    @classmethod
    def of(cls, record: StageRecord) -> Readings:
        """Those of a run's folder."""
        return cls(record.stage, record.config, record.curves)

    @property
    def images_seen(self) -> int:
        """At the newest of them."""
        return max((curve[-1][0] for curve in self.curves.values() if curve), default=0)

    def values(self, metric: str) -> list[float]:
        """Oldest first; empty where there are none."""
        return [value for _, value in self.curves.get(metric, [])]

    def recent(self, metric: str) -> float:
        """The median of the newest tenth: single batches say little. One value at least; NaN where one is NaN."""
        return median(tail(self.values(metric), 0.1))


def unless_learning(readings: Readings, metric: str, finding: Finding) -> Finding:
    """What is bad but early, or has become better since it was first measured, is no more than to be looked at."""
    first, newest = readings.values(metric)[0], readings.values(metric)[-1]
    gain = (newest - first) if metric.endswith("psnr") else (first - newest)
    may_come = readings.images_seen < EARLY or gain > LEARNING * abs(first)
    return replace(finding, verdict=LOOK) if may_come and finding.verdict == BAD else finding


def tail(values: list[float], part: float) -> list[float]:
    """The last part of some values, one of them at least."""
    return values[-max(1, int(len(values) * part)) :]


def median(values: list[float]) -> float:
    """In the middle; NaN where one is NaN."""
    return math.nan if any(map(math.isnan, values)) else statistics.median(values)


def missing(check: str, what: str, why: str = "was not logged") -> Finding:
    """There is nothing to look at."""
    return Finding(check, UNKNOWN, f"{what} {why}")


def in_range(check: str, value: float, words: str, healthy: Healthy, advice: str) -> Finding:
    """Judge a number. `words` is a format for it."""
    return Finding(check, healthy.verdict(value), words.format(value), str(healthy), advice)

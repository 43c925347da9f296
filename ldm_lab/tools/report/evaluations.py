"""Groups the evaluations of several runs by measurement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ldm_lab.runs.metrics import rank
from ldm_lab.runs.record import Curve, Evaluation, RunRecord
from ldm_lab.tools.report.protocol import measurement_and_sampling, seen
from ldm_lab.utils.nested import find


@dataclass(frozen=True)
class Series:
    """One kind of measurement across several runs.

    Attributes:
        title: description of the measurement.
        runs: for each run its evaluations, the oldest model first; may be empty.
    """

    title: str
    runs: list[list[Evaluation]]

    @property
    def metrics(self) -> list[str]:
        """Names without prefix, what tells most first."""
        return sorted({name for found in self.runs for evaluation in found for name in evaluation.metrics}, key=_place)

    def of(self, name: str) -> list[list[Evaluation]]:
        """For each run, the evaluations that have a metric."""
        return [[evaluation for evaluation in found if name in evaluation.metrics] for found in self.runs]

    def curves(self, name: str) -> list[Curve]:
        """A metric over images seen, for each run."""
        return [[(seen(e), float(e.metrics[name]["value"])) for e in found] for found in self.of(name)]


def _place(name: str) -> tuple[int, str]:
    return rank(f"eval/{name}")


def series(runs: Sequence[RunRecord]) -> list[Series]:
    """All evaluations, grouped by measurement and sampling settings."""
    rules = {}
    for run in runs:
        for evaluation in run.evaluations:
            rule = measurement_and_sampling(evaluation)
            rules.setdefault(str(sorted(rule.items(), key=str)), (rule, evaluation))
    found = []
    for rule, example in rules.values():
        same = [[e for e in run.evaluations if measurement_and_sampling(e) == rule] for run in runs]
        found.append(Series(_title(example), [sorted(of_run, key=seen) for of_run in same]))
    return found


def _title(evaluation: Evaluation) -> str:
    content = evaluation.content
    parts = [f"{content.get('num_samples')} {content.get('kind')}"]
    if sampler := find(content, "sampling.sampler"):
        parts.append(f"{sampler} {find(content, 'sampling.steps')} steps, eta {find(content, 'sampling.eta')}")
    if length := find(content, "sampling.ema"):
        parts.append(f"EMA of length {length}")
    if scale := find(content, "sampling.guidance"):
        interval = find(content, "sampling.guidance_interval")
        where = f" at noise levels {interval}" if interval else ""
        parts.append(f"guidance {scale} by {find(content, 'sampling.guide')}{where}")
    if extractor := find(content, "extractor.name"):
        parts.append(f"features: {extractor}")
    return ", ".join(parts)

"""Compares metrics of several runs: which run is better, by how much, and whether it is significant."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ldm_lab.runs import metrics
from ldm_lab.runs.metrics import direction, rank
from ldm_lab.runs.record import RunRecord, StageRecord
from ldm_lab.runs.stages import AUTOENCODER, DIFFUSION
from ldm_lab.tools.report.protocol import alike, does_not_compare
from ldm_lab.tools.report.values import Value, evaluated, measured
from ldm_lab.utils.nested import find

# Of two single numbers, each without an interval, less than this says nothing.
EVEN = 0.01  # part of the value
EVEN_DB = 0.1  # PSNR


@dataclass(frozen=True)
class Comparison:
    """One metric of all runs.

    Attributes:
        metric: name with its prefix.
        stage: stage of the `metrics.csv` that has the metric; None: from evaluations.
        better: "lower" or "higher".
        values: value of each run; None if missing.
        compares: whether at least two values are comparable.
        best: index of the better run; None: no run is better.
        says: the result in words.
        amount: by how much the best run is better.
    """

    metric: str
    stage: str | None
    better: str
    values: list[Value | None]
    compares: bool
    best: int | None
    says: str
    amount: str = ""

    @property
    def title(self) -> str:
        """Stage and metric."""
        return f"{self.stage} {self.metric}" if self.stage else self.metric


def compare(runs: Sequence[RunRecord], names: Sequence[str]) -> list[Comparison]:
    """Compare the main metrics: evaluations, then stage 2, then stage 1. `names` are the names of the runs."""
    found = [_of_evaluations(metric, runs, names) for metric in _evaluated_metrics(runs)]
    for stage in (DIFFUSION, AUTOENCODER):
        records = [run.stages.get(stage) for run in runs]
        logged = {metric for record in records if record for metric in record.curves}
        evaluated_in_training = {metric for metric in logged if metric.startswith("eval/") and direction(metric)}
        more = evaluated_in_training - {comparison.metric for comparison in found}
        validated = [metric for metric in metrics.main(stage, evaluated=False) if metric in logged]
        wanted = [*sorted(more, key=rank), *validated]
        found += [_of_stages(stage, metric, records, names) for metric in wanted]
    return found


def verdict(comparisons: Sequence[Comparison], names: Sequence[str]) -> str:
    """One or two sentences on which run is better and by how much."""
    if len(names) < 2:
        return "One run; give another to compare it with."
    comparable = [comparison for comparison in comparisons if comparison.compares]
    decided = [comparison for comparison in comparable if comparison.best is not None]
    if not comparable:
        return "No number of these runs compares; the reasons stand beside them."
    if not decided:
        return f"No difference can be told from the {len(comparable)} number(s) that compare."
    winners = {place: [c for c in decided if c.best == place] for place in dict.fromkeys(c.best for c in decided)}
    if len(winners) == 1:
        (place,) = winners
        head = decided[0]
        rest = f", on {len(decided)} of {len(comparable)} numbers that compare" if len(comparable) > 1 else ""
        return f"{names[place]} is better{rest}: {head.title} {head.amount}."
    parts = [f"{names[place]} on {', '.join(c.title for c in won)}" for place, won in winners.items()]
    return f"The numbers disagree. Better is {'; '.join(parts)}."


def _of_stages(stage: str, metric: str, records: Sequence[StageRecord | None], names: Sequence[str]) -> Comparison:
    """Compare a metric of `metrics.csv` at the last number of images that all runs with the metric have."""
    having = [record for record in records if record and metric in record.curves]
    common = set.intersection(*({images for images, _ in record.curves[metric]} for record in having))
    at = max(common, default=None)
    values = [measured(record, metric, at) if record and metric in record.curves else None for record in records]
    note = "" if common else ", at different numbers of images"
    return _judged(metric, stage, values, names, does_not_compare(having, metric), note)


def _evaluated_metrics(runs: Sequence[RunRecord]) -> list[str]:
    metrics = {f"eval/{name}" for run in runs for evaluation in run.evaluations for name in evaluation.metrics}
    return sorted((metric for metric in metrics if direction(metric)), key=rank)


def _of_evaluations(metric: str, runs: Sequence[RunRecord], names: Sequence[str]) -> Comparison:
    name = metric.rpartition("/")[2]
    candidates = [[found for found in run.evaluations if name in found.metrics] for run in runs]
    chosen, reason, note = alike([found for found in candidates if found])
    queue = iter(chosen)
    values = [evaluated(next(queue), name) if found else None for found in candidates]
    found = _judged(metric, None, values, names, reason, note)
    floors = {find(evaluation.content, f"held_out.metrics.{name}.value") for evaluation in chosen}
    if found.compares and len(floors) == 1 and isinstance(floor := floors.pop(), (int, float)):
        return replace(found, says=f"{found.says}; held-out images themselves have {floor:.4g}")
    return found


def _judged(
    metric: str,
    stage: str | None,
    values: list[Value | None],
    names: Sequence[str],
    reason: str | None,
    note: str,
) -> Comparison:
    better = direction(metric) or "lower"
    found = [place for place, value in enumerate(values) if value]
    if len(found) < 2:
        return Comparison(metric, stage, better, values, False, None, f"only in {names[found[0]]}")
    if spoiled := [names[place] for place in found if not math.isfinite(values[place].value)]:
        reason = reason or f"not finite in {', '.join(spoiled)}"
    if reason:
        return Comparison(metric, stage, better, values, False, None, f"does not compare: {reason}")
    best, second = sorted(found, key=lambda place: values[place].value, reverse=better == "higher")[:2]
    amount, apart = difference(metric, values[best], values[second])
    note = _intervals(values[best], values[second], apart) + note
    if not apart:
        says = f"no difference can be told: {amount} apart{note}"
        return Comparison(metric, stage, better, values, True, None, says)
    amount = f"{amount} {better} than {names[second]}{note}"
    return Comparison(metric, stage, better, values, True, best, f"{names[best]} is better: {amount}", amount)


def difference(metric: str, best: Value, second: Value) -> tuple[str, bool]:
    """The difference of two values in words, and whether it is significant."""
    distance = abs(best.value - second.value)
    part = distance / abs(second.value) if best.value * second.value > 0 else math.inf
    known = metrics.find(metric)
    if known and known.unit == "dB":
        amount, apart = f"{distance:.2f} dB", distance >= EVEN_DB
    elif math.isfinite(part):
        amount, apart = f"{100 * part:,.0f} %" if part >= 0.1 else f"{100 * part:.2g} %", part >= EVEN
    else:
        amount, apart = f"{distance:.3g}", distance > 0
    if _have_intervals(best, second):
        apart = best.high < second.low or best.low > second.high
    return amount, apart


def _have_intervals(*values: Value) -> bool:
    return all(value.low is not None and value.high is not None for value in values)


def _intervals(best: Value, second: Value, apart: bool) -> str:
    if not _have_intervals(best, second):
        return ""
    return " (the intervals do not meet)" if apart else " (the intervals overlap)"

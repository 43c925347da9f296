"""Content of a report page, as plain data: strings, numbers, lists, pictures as `data:` URIs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from ldm_lab.runs.metrics import HOURS, TENTHS, direction
from ldm_lab.runs.record import Curve, RunRecord, StageRecord, last
from ldm_lab.runs.settings import is_harmless
from ldm_lab.runs.stages import STAGES
from ldm_lab.tools.report.compare import Comparison, compare, verdict
from ldm_lab.tools.report.evaluations import series
from ldm_lab.tools.report.pictures import Budget, chosen, inlined
from ldm_lab.tools.report.protocol import does_not_compare, other_images
from ldm_lab.tools.report.values import Value, best, best_of, evaluated, measured, thinned
from ldm_lab.utils.nested import find, flatten
from ldm_lab.utils.reading import LoadError

Plain = dict[str, Any]

POINTS = 1200  # of a curve
PICTURES = ("samples", "reconstructions", "denoising", "samples_raw", "neighbours", "codebook", "data")  # in this order
MAIN_PICTURES = PICTURES[:2]  # the others are folded
FIRST = ("eval/", "val/loss", "val/psnr", "val/ssim", "val/", "codebook/", "train/loss", "train/", "disc/")  # metrics
SPEED = ("perf/images_per_second", HOURS, "perf/memory_gb")


def content(runs: Sequence[RunRecord], budget: Budget) -> Plain:
    """The complete content of the page.

    Raises:
        LoadError: a run has no metrics, or something in it cannot be read.
    """
    for run in runs:
        if not any(record.curves for record in run.stages.values()):
            raise LoadError(f"{run.folder}: nothing was measured yet: no stage has a metrics.csv with a row in it")
    names = labels(runs)
    comparisons = compare(runs, names)
    return {
        "runs": [_run(run, name) for run, name in zip(runs, names, strict=True)],
        "verdict": verdict(comparisons, names),
        "warnings": warnings(runs),
        "comparisons": [_comparison(comparison) for comparison in comparisons],
        "pictures": list(_pictures(runs, budget)),
        "curves": list(_curves(runs)),
        "metrics": [*_evaluations(runs), *_metrics(runs)],
        "settings": list(_settings(runs)),
        "speed": list(_speed(runs)),
    }


def labels(runs: Sequence[RunRecord]) -> list[str]:
    """A name for each run: the run's name, or its folder if names repeat."""
    count = Counter(run.name for run in runs)
    return [run.name if count[run.name] == 1 else str(run.folder) for run in runs]


def warnings(runs: Sequence[RunRecord]) -> list[str]:
    """One line for each stage whose held-out metrics are not comparable."""
    found = []
    for stage in STAGES:
        records = [run.stages[stage] for run in runs if stage in run.stages]
        if len(records) > 1 and (reason := other_images(records)):
            found.append(f"{stage}: {reason}. What was measured on them is shown, but not compared.")
    return found


def _run(run: RunRecord, name: str) -> Plain:
    stages = [
        {
            "stage": stage,
            "images": record.images_seen,
            "planned": found if isinstance(found := record.config.get("max_images"), int) else None,
            "finished": record.status.get("finished") is True,
        }
        for stage, record in run.stages.items()
    ]
    return {"name": name, "folder": str(run.folder), "stages": stages}


def _number(value: float) -> float | str:
    """Numbers that are not finite become strings, as JSON has no NaN."""
    return value if math.isfinite(value) else str(value)


def _value(value: Value | None) -> Plain | None:
    if value is None:
        return None
    ends = {} if value.low is None or value.high is None else {"low": _number(value.low), "high": _number(value.high)}
    return {"value": _number(value.value), "file": str(value.file), "images": value.images_seen, **ends}


def _comparison(found: Comparison) -> Plain:
    values = [_value(value) for value in found.values]
    return {
        "metric": found.metric, "stage": found.stage, "better": found.better, "values": values,
        "compares": found.compares, "best": found.best, "says": found.says,
    }  # fmt: skip


def _records(runs: Sequence[RunRecord]) -> Iterable[tuple[str, list[StageRecord | None]]]:
    """The stages, last stage first, with each run's record of the stage."""
    for stage in reversed(STAGES):
        records = [run.stages.get(stage) for run in runs]
        if any(records):
            yield stage, records


def _logged(records: Iterable[StageRecord | None]) -> list[str]:
    """Logged metrics, most informative first."""
    metrics = {metric for record in records if record for metric in record.curves}
    return sorted(metrics, key=lambda name: (next((n for n, p in enumerate(FIRST) if name.startswith(p)), 99), name))


def _curves(runs: Sequence[RunRecord]) -> Iterable[Plain]:
    for one in series(runs):
        metrics = [{"metric": f"eval/{name}", "runs": [_points(c) for c in one.curves(name)]} for name in one.metrics]
        if any(len(curve) > 1 for metric in metrics for curve in metric["runs"]):
            yield {"stage": one.title, "hours": [[] for _ in runs], "metrics": metrics}
    for stage, records in _records(runs):
        hours = [_points(record.curves.get(HOURS, [])) if record else [] for record in records]
        metrics = [
            {"metric": metric, "runs": [_points(record.curves.get(metric, [])) if record else [] for record in records]}
            for metric in _logged(records)
            if metric != HOURS and metric not in TENTHS
        ]
        yield {"stage": stage, "hours": hours, "metrics": [*metrics, *_by_timestep(records)]}


def _by_timestep(records: Sequence[StageRecord | None]) -> Iterable[Plain]:
    """The newest losses by tenth of the timesteps, as one curve for each run."""
    curves = [
        {metric: record.curves[metric] for metric in TENTHS if metric in record.curves} if record else {}
        for record in records
    ]
    if any(curves):
        runs = [[[TENTHS.index(metric) + 1, _number(last(curve))] for metric, curve in c.items()] for c in curves]
        yield {"metric": "val/loss_t0 to t9, newest", "axis": "tenth of the timesteps, 10: most noise", "runs": runs}


def _points(curve: Curve) -> list[list[Any]]:
    return [[images, _number(value)] for images, value in thinned(curve, POINTS)]


def _pictures(runs: Sequence[RunRecord], budget: Budget) -> Iterable[Plain]:
    """Pictures by kind, most informative first."""
    known = dict(_records(runs))
    kinds = {(kind, stage) for stage in known for record in known[stage] if record for kind in record.pictures}
    for kind, stage in sorted(kinds, key=lambda found: (_place(found[0]), found)):
        shown = []
        for record in known[stage]:
            found = record.pictures.get(kind, {}) if record else {}
            steps = chosen(sorted(found), budget.steps)
            shown.append([{"images": step, "picture": inlined(found[step], budget)} for step in steps])
        note, main = _note(kind, known[stage]), kind in MAIN_PICTURES
        yield {"stage": stage, "name": kind, "main": main, "note": note, "runs": shown}


def _place(kind: str) -> int:
    return PICTURES.index(kind) if kind in PICTURES else len(PICTURES)


def _note(kind: str, records: Sequence[StageRecord | None]) -> str:
    """A note on the seeds of sample pictures."""
    seeds = [find(record.config, "callbacks.sample_grid.seed") for record in records if record]
    if not kind.startswith("samples") or len(seeds) < 2 or None in seeds:
        return ""
    if len(set(map(str, seeds))) > 1:
        return f"drawn from different seeds: {', '.join(map(str, seeds))}"
    return "drawn from the same seeds: those in the same place began as the same noise"


def _metrics(runs: Sequence[RunRecord]) -> Iterable[Plain]:
    for stage, records in _records(runs):
        for metric in _logged(records):
            if metric in SPEED:
                continue
            kept = [record if record and metric in record.curves else None for record in records]
            final = [_value(measured(record, metric)) if record else None for record in kept]
            on_the_way = [_value(best(record, metric)) if record else None for record in kept]
            alike = not does_not_compare([record for record in kept if record], metric)
            yield _row(stage, metric, direction(metric), alike, final, on_the_way)


def _evaluations(runs: Sequence[RunRecord]) -> Iterable[Plain]:
    """The newest and the best evaluation of each series."""
    for one in series(runs):
        for name in one.metrics:
            values = [[evaluated(evaluation, name) for evaluation in found] for found in one.of(name)]
            better = direction(f"eval/{name}")
            newest = [_value(found[-1]) if found else None for found in values]
            yield _row(
                one.title, f"eval/{name}", better, True, newest, [_value(best_of(found, better)) for found in values]
            )


def _row(
    stage: str, metric: str, better: str | None, alike: bool, final: list[Plain | None], best: list[Plain | None]
) -> Plain:
    """A table row of a metric of all runs; only `alike` (comparable) values are marked as better."""
    main = better is not None and metric not in TENTHS
    return {
        "stage": stage,
        "metric": metric,
        "better": better if alike else None,
        "main": main,
        "final": final,
        "best": best,
    }


def _settings(runs: Sequence[RunRecord]) -> Iterable[Plain]:
    """The settings that differ between runs; runs without the stage are ignored."""
    for stage, records in _records(runs):
        flat = [flatten(record.config) if record else None for record in records]
        having = [settings for settings in flat if settings is not None]
        for key in dict.fromkeys(key for settings in having for key in settings if key != "name"):
            values = [_setting(settings, key) for settings in flat]
            if len({value for value, settings in zip(values, flat, strict=True) if settings is not None}) > 1:
                first = next(record.config for record in records if record and key in flatten(record.config))
                yield {"stage": stage, "key": key, "harmless": is_harmless(key, first), "values": values}


def _setting(settings: Plain | None, key: str) -> str | None:
    return str(settings[key]) if settings is not None and key in settings else None


def _speed(runs: Sequence[RunRecord]) -> Iterable[Plain]:
    for stage, records in _records(runs):
        rates = [_value(_median(record)) if record else None for record in records]
        yield {"stage": stage, "metric": "images per second, median", "final": rates}
        for metric, title in ((HOURS, "device hours"), ("perf/memory_gb", "memory, GB")):
            having = [record if record and metric in record.curves else None for record in records]
            if any(having):
                values = [_value(measured(record, metric)) if record else None for record in having]
                yield {"stage": stage, "metric": title, "final": values}


def _median(record: StageRecord) -> Value | None:
    """The row of median throughput."""
    curve = sorted(record.curves.get(SPEED[0], []), key=lambda point: point[1])
    return measured(record, SPEED[0], curve[len(curve) // 2][0]) if curve else None

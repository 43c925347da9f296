"""Build W&B's dashboards: a saved workspace for each stage, and a report, that compare runs.

They show quality over images seen and over device hours, samples of the same seeds step by run, the codec, losses by
timestep, throughput and memory, and the settings in which the runs differ. With --runs there are panels of what these
runs have logged, and of no others. Where nobody is logged in, or W&B cannot be reached, the specification is written
to a file instead.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ldm_lab.runs import metrics, tracking
from ldm_lab.runs.record import RunRecord, StageRecord, read_run
from ldm_lab.runs.stages import STAGES
from ldm_lab.tools.dashboard import layout
from ldm_lab.tools.dashboard.layout import PICTURES
from ldm_lab.utils.errors import UserError, one_line
from ldm_lab.utils.nested import flatten
from ldm_lab.utils.writing import write_json

APART = ("name", "paths.", "logger.", "callbacks.", "plugins", "resume", "data.root", "data.cache_dir")  # not settings
USUAL = ("model.optimizer.lr", "data.global_batch_size", "max_images", "seed")
MOST = 10  # maximum number of parallel coordinates


def main(argv: list[str]) -> None:
    """Build and save dashboards. Raises `UserError` for invalid flags, `LoadError` if a folder is no run."""
    options = parse(argv)
    runs = [read_run(folder) for folder in options.runs]
    baseline = read_run(options.baseline) if options.baseline else None
    views = tools()
    pages = [page(views, stage, runs, baseline) for stage in STAGES if not runs or any(stage in r.stages for r in runs)]
    why = None if options.output else away()
    entity = options.entity or ("" if options.output or why else default_entity())
    workspaces = [views.workspace(one, entity, options.project) for one in pages]
    report = views.report(pages, entity, options.project)
    if not options.output and not why:
        try:
            for one in (report, *workspaces):  # the report creates a missing project
                print(f"saved: {one.save().url}")
            return
        except Exception as error:  # any error of W&B
            why = f"W&B cannot be reached ({one_line(error)})"
    path = unused(options.output or Path(f"dashboard_{options.project}.json"))
    write_json(path, views.specification(workspaces, report))
    print(f"{why + ': ' if why else ''}the specification of the dashboard is in {path}")


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the flags."""
    text = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m ldm_lab dashboard", description=__doc__, formatter_class=text)
    parser.add_argument("--project", required=True, help="the W&B project (logger.wandb.project)")
    parser.add_argument("--entity", help="user or team; default: yours")
    parser.add_argument("--runs", nargs="+", type=Path, default=[], metavar="RUN", help="folders of runs to compare")
    parser.add_argument("--baseline", type=Path, metavar="RUN", help="pinned, and what the others are compared with")
    parser.add_argument("--output", type=Path, help="write the specification there, and save nothing")
    return parser.parse_args(argv)


def page(views: Any, stage: str, runs: Sequence[RunRecord], baseline: RunRecord | None) -> Any:  # noqa: ANN401
    """The page of a stage."""
    records = [run.stages[stage] for run in runs if stage in run.stages]
    names = logged(records) if records else None
    evaluated = [name for name in metrics.main(stage, evaluated=True) if name in (names or ())]
    result = [*evaluated, *metrics.main(stage, evaluated=False)][0]
    return views.Page(
        stage=stage,
        sections=layout.sections(stage, names),
        columns=differing(records),
        result=f"{result}.{'max' if metrics.direction(result) == 'higher' else 'min'}",  # as summaries have it
        groups=[str(record.config["name"]) for record in records],
        baseline=wandb_id(baseline.stages[stage]) if baseline and stage in baseline.stages else None,
    )


def logged(records: Sequence[StageRecord]) -> set[str]:
    """Logged metrics and pictures, with prefix, of one stage of some runs."""
    metrics = {name for record in records for name in record.curves}
    return metrics | {f"{PICTURES}{name}" for record in records for name in record.pictures}


def differing(records: Sequence[StageRecord]) -> list[str]:
    """The first settings in which runs differ; without differences, the settings that users often change."""
    settings = [flatten(record.config) for record in records]
    keys = dict.fromkeys(key for one in settings for key in one if not key.startswith(APART))
    found = [key for key in keys if len({str(one.get(key)) for one in settings}) > 1]
    return found[:MOST] or list(USUAL)


def wandb_id(record: StageRecord) -> str:
    """The id of a stage's W&B run. Raises `UserError` if it has none."""
    found = tracking.run_id(record.folder)
    if found is None:
        missing = f"{tracking.RUN_ID} is missing"
        raise UserError(f"--baseline {record.folder}: has no W&B run ({missing}): train with logger=many")
    return found


def unused(path: Path) -> Path:
    """Return `path`; raises `UserError` if it exists."""
    if path.exists():
        raise UserError(f"--output {path}: is there already; name another file")
    return path


def tools() -> Any:  # noqa: ANN401
    """The module `views`. Raises `UserError` if `wandb-workspaces` is not installed."""
    try:
        return importlib.import_module("ldm_lab.tools.dashboard.views")
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed: pip install 'ldm_lab[dashboards]'") from error


def away() -> str | None:
    """Why saving online is impossible; None: it may work."""
    if os.environ.get("WANDB_MODE") in ("offline", "disabled"):
        return f"WANDB_MODE={os.environ['WANDB_MODE']}"
    import wandb

    with contextlib.suppress(Exception):
        if wandb.login(prompt=False, verify=False):
            return None
    return "nobody is logged in to W&B"


def default_entity() -> str:
    """The user's default W&B entity; empty if unknown, as saving then raises the error."""
    import wandb

    with contextlib.suppress(Exception):
        return str(wandb.Api(timeout=20).default_entity or "")
    return ""

"""Logged metrics and differing settings of the runs on a dashboard."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ldm_lab.runs import tracking
from ldm_lab.runs.record import StageRecord
from ldm_lab.tools.dashboard.layout import PICTURES
from ldm_lab.utils.errors import UserError
from ldm_lab.utils.nested import flatten

APART = ("name", "paths.", "logger.", "callbacks.", "plugins", "resume", "data.root", "data.cache_dir")  # not settings
USUAL = ("model.optimizer.lr", "data.global_batch_size", "max_images", "seed")
MOST = 10  # maximum number of parallel coordinates


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

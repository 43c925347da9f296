"""Runs in W&B, whoever starts them: a training's logger, and what comes after it."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm_lab.runs.record import AXIS
from ldm_lab.utils.errors import one_line
from ldm_lab.utils.reading import read_yaml
from ldm_lab.utils.writing import write_json

log = logging.getLogger(__name__)

PATIENCE = 60.0  # seconds, for a start and for the end
RUN_ID = "wandb_id"  # the file in a stage's folder that keeps the id of its W&B run
PLAIN_ID = re.compile(r"[a-z0-9]{1,32}")


def run_id(folder: Path) -> str | None:
    """The id of a stage's W&B run; None where its folder keeps no plain id."""
    path = folder / RUN_ID
    if not path.is_file():  # a pipe would be waited for
        return None
    with open(path, encoding="utf-8", errors="replace") as file:
        found = file.read(100).strip()
    return found if PLAIN_ID.fullmatch(found) else None


def start(folder: Path, offline: bool, **settings: Any) -> Any:  # noqa: ANN401
    """A W&B run: online only where the user is logged in, else into `folder/wandb`; it never asks.

    A start that fails online is repeated offline, for `wandb sync`, which a line says. `WANDB_MODE=disabled` is
    respected.

    Args:
        folder: where its files go.
        offline: never go online.
        **settings: of `wandb.init`.
    """
    import wandb

    mode = "disabled" if os.environ.get("WANDB_MODE") == "disabled" else "offline"
    failure = None
    try:
        if mode == "offline" and not offline and wandb.login(prompt=False, verify=False):
            return _init(folder, None, settings)
    except Exception as error:
        failure = error
    run = _init(folder, mode, settings)
    if failure:
        log.warning("W&B cannot be reached (%s): it stays offline, in %s", one_line(failure), folder / "wandb")
    return run


def _init(folder: Path, mode: str | None, settings: dict[str, Any]) -> Any:  # noqa: ANN401
    import wandb

    quiet = wandb.Settings(silent=True, init_timeout=PATIENCE, finish_timeout=PATIENCE)
    run = wandb.init(dir=folder, mode=mode, settings=quiet, **settings)
    run.define_metric(AXIS)
    run.define_metric("*", step_metric=AXIS)
    return run


def finish(run: Any, exit_code: int = 0) -> None:  # noqa: ANN401
    """End a run. Raises `OSError` where its service could not write all: it tells nobody but its log."""
    run.finish(exit_code=exit_code)
    said = Path(run.settings.log_internal)
    if said.is_file() and "failed to save record" in said.read_text(encoding="utf-8", errors="replace")[-100_000:]:
        raise OSError(f"not all could be written, see {said}")


def declare(run: Any, folder: Path, kind: str, content: str, facts: dict[str, Any], used: bool = False) -> None:  # noqa: ANN401
    """Say that a run has made something, or used it: autoencoder -> latents -> diffusion -> samples -> evaluation.

    What it is, its content decides: equal contents are one artifact, `<kind>-<content>`, whichever run names it, so
    that runs hang together, online and offline. Only a small file goes to W&B, `content.json`.

    Args:
        run: of W&B.
        folder: of the run; the small file is kept in its `artifacts/`.
        kind: "autoencoder", "latents", "diffusion", "samples" or "evaluation".
        content: hash of it.
        facts: plain data about it, such as where it lies.
        used: whether the run has used it; else it has made it.
    """
    import wandb

    if run.disabled:
        return
    path = folder / "artifacts" / f"{kind}-{content}.json"
    write_json(path, {"kind": kind, "content": content})
    artifact = wandb.Artifact(f"{kind}-{content}", type=kind, metadata=facts)
    artifact.add_file(str(path), name="content.json", skip_cache=True, policy="immutable")
    if used:  # as `run.use_artifact` does, which will not have it offline
        run._log_artifact(artifact, is_user_created=True, use_after_commit=True)
    else:
        run.log_artifact(artifact)


def log_to_run(
    stage: Path,
    folder: Path,
    used: tuple[str, str],
    made: tuple[str, str],
    facts: dict[str, Any],
    metrics: Mapping[str, float] | None = None,
    images_seen: int | None = None,
) -> None:
    """Tell W&B what was made of a stage's result, in a run of its own, in the project and group of the stage's.

    Nothing is told of a stage that was trained without W&B or elsewhere, and what goes wrong is one warning.

    Args:
        stage: folder of the stage.
        folder: where the new run's files go.
        used: kind and content of what it is made of, e.g. ("diffusion", fingerprint of the UNet).
        made: the same of what was made; its kind is the job type.
        facts: plain data about it.
        metrics: name with its prefix -> value.
        images_seen: of the weights that were used, the axis of the metrics.
    """
    kind = made[0]
    if not (stage / "config.yaml").is_file():
        return
    try:
        settings = (read_yaml(stage / "config.yaml").get("logger") or {}).get("wandb") or {}
        if "project" not in settings:
            return
        known = {key: settings[key] for key in ("project", "entity", "group", "tags") if settings.get(key)}
        name = f"{settings['group']}/{kind}"
        folder.mkdir(parents=True, exist_ok=True)
        run = start(folder, settings["offline"], job_type=kind, name=name, config=facts, **known)
        if settings.get("artifacts", True):
            declare(run, folder, *used, {}, used=True)
            declare(run, folder, *made, facts)
        if metrics:
            run.log({AXIS: images_seen or 0, **metrics})
        finish(run)
    except Exception as error:  # what was made is there, and stays
        log.warning("W&B was not told of the %s: %s", kind, one_line(error))

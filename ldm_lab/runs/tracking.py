"""Starts and ends W&B runs, of a training and of what is made from its result, and links them by artifacts."""

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

PATIENCE = 60.0  # seconds to wait when a run starts or ends
RUN_ID = "wandb_id"  # file in a stage's folder with the id of its W&B run
PLAIN_ID = re.compile(r"[a-z0-9]{1,32}")


def run_id(folder: Path) -> str | None:
    """The id of a stage's W&B run; None if its folder holds no valid id."""
    path = folder / RUN_ID
    if not path.is_file():  # reading a pipe would block
        return None
    with open(path, encoding="utf-8", errors="replace") as file:
        text = file.read(100).strip()
    return text if PLAIN_ID.fullmatch(text) else None


def start(folder: Path, offline: bool, **settings: Any) -> Any:  # noqa: ANN401
    """Start a W&B run, online if the user is logged in, else offline in `folder/wandb`; never prompts.

    If the online start fails, the run starts offline, for `wandb sync`, with a warning. `WANDB_MODE=disabled` holds.

    Args:
        folder: folder for the files of W&B.
        offline: never go online.
        **settings: arguments of `wandb.init`.
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
        log.warning("W&B cannot be reached (%s): the run stays offline, in %s", one_line(failure), folder / "wandb")
    return run


def _init(folder: Path, mode: str | None, settings: dict[str, Any]) -> Any:  # noqa: ANN401
    import wandb

    quiet = wandb.Settings(silent=True, init_timeout=PATIENCE, finish_timeout=PATIENCE)
    run = wandb.init(dir=folder, mode=mode, settings=quiet, **settings)
    run.define_metric(AXIS)
    run.define_metric("*", step_metric=AXIS)
    return run


def finish(run: Any, exit_code: int = 0) -> None:  # noqa: ANN401
    """End a run. Raises `OSError` if the service of W&B could not write all records, which only its log says."""
    run.finish(exit_code=exit_code)
    path = Path(run.settings.log_internal)
    if path.is_file() and "failed to save record" in path.read_text(encoding="utf-8", errors="replace")[-100_000:]:
        raise OSError(f"some records could not be written, see {path}")


def declare(run: Any, folder: Path, kind: str, content: str, facts: dict[str, Any], used: bool = False) -> None:  # noqa: ANN401
    """Log an artifact that a run has made or used: autoencoder -> latents -> diffusion -> samples -> evaluation.

    Equal contents are one artifact, `<kind>-<content>`, in every run, online and offline, and so link these runs. Only
    a small file, `content.json`, goes to W&B.

    Args:
        run: the W&B run.
        folder: the run's folder; its `artifacts/` keeps the small file.
        kind: "autoencoder", "latents", "diffusion", "samples" or "evaluation".
        content: hash of the artifact's content.
        facts: plain data about the artifact, such as its path.
        used: whether the run has used the artifact, instead of making it.
    """
    import wandb

    if run.disabled:
        return
    path = folder / "artifacts" / f"{kind}-{content}.json"
    write_json(path, {"kind": kind, "content": content})
    artifact = wandb.Artifact(f"{kind}-{content}", type=kind, metadata=facts)
    artifact.add_file(str(path), name="content.json", skip_cache=True, policy="immutable")
    if used:  # as `run.use_artifact` does, which refuses offline runs
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
    """Log a product of a stage's result to W&B: as a new run in the project and group of the stage's run.

    Logs nothing if the stage was trained without W&B or elsewhere; any failure gives one warning.

    Args:
        stage: the stage's folder.
        folder: folder for the new run's files.
        used: kind and content hash of the result, e.g. ("diffusion", fingerprint of the UNet).
        made: kind and content hash of the product; the kind is also the job type.
        facts: plain data about the product.
        metrics: name with prefix -> value.
        images_seen: training images of the result, for the axis of the metrics.
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
    except Exception as error:  # the product itself is complete
        log.warning("the %s could not be logged to W&B: %s", kind, one_line(error))

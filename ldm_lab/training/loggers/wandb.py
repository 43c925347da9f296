"""Weights & Biases logger: one W&B run per stage, grouped by the run's name; never prompts, never stops training."""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

from ldm_lab.runs import tracking
from ldm_lab.runs.record import AXIS
from ldm_lab.training.loggers.run_logger import RunLogger
from ldm_lab.utils.errors import one_line
from ldm_lab.utils.reading import read_json
from ldm_lab.utils.writing import replacing, write_json

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger(__name__)

YOUNG = 300  # rows: more than in the 15 seconds that W&B buffers and a killed process loses


class WandbLogger(RunLogger):
    """Logs to W&B over images seen: online if the user is logged in, else into `folder/wandb`.

    On any W&B error training goes on with one warning. A start that fails online is retried offline (see
    `ldm_lab.runs.tracking.start`); if the retry fails, or the service fails later, W&B is not used any more.

    Args:
        folder: the stage's folder; keeps the W&B run's id, so that a resumed stage continues its W&B run.
        project: the W&B project.
        group: the run's name, which groups the stages of the run.
        job_type: the stage.
        offline: never go online.
        artifacts: declare the stage's outputs and inputs to W&B (see `ldm_lab.runs.tracking.declare`).
        summaries: "min" or "max" -> metrics, or patterns such as `eval/fd_*`, whose summary is that extreme.
        **settings: further arguments of `wandb.init`, e.g. `entity` or `tags`.
    """

    def __init__(
        self,
        folder: str,
        project: str,
        group: str,
        job_type: str,
        offline: bool = False,
        artifacts: bool = True,
        summaries: dict[str, Sequence[str]] | None = None,
        **settings: Any,  # noqa: ANN401
    ) -> None:
        super().__init__()
        self.folder, self.offline, self.artifacts, self.summaries = Path(folder), offline, artifacts, summaries or {}
        self.settings = {
            "project": project, "group": group, "job_type": job_type, "name": f"{group}/{job_type}", **settings,
        }  # fmt: skip
        self._run: Any = None
        self._away = False
        self._defined: set[str] = set()
        self._young: deque[dict[str, float]] = deque(maxlen=YOUNG)

    @property
    def name(self) -> str:
        """The W&B project."""
        return self.settings["project"]

    @property
    def version(self) -> str:
        """The W&B run's id, made once and kept in the stage's folder; a new id replaces an invalid one there."""
        if found := tracking.run_id(self.folder):
            return found
        new = uuid4().hex[:12]
        with replacing(self.folder / tracking.RUN_ID) as temporary:
            temporary.write_text(new, encoding="utf-8")
        return new

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:  # noqa: ANN401
        """The W&B run, started on first use; None if W&B has failed (Lightning then gives a dummy)."""
        if self._run is None and not self._away:
            try:
                self._run = self._start()
            except Exception as error:  # training goes on after any error of W&B
                self._leave(error)
        return self._run

    def _start(self) -> Any:  # noqa: ANN401
        self._defined.clear()
        return tracking.start(self.folder, self.offline, id=self.version, resume="allow", **self.settings)

    def _log(self, run: Any, row: dict[str, float]) -> None:  # noqa: ANN401
        for name in row.keys() - self._defined:  # W&B's own patterns are ambiguous if several match
            self._defined.add(name)
            for summary, patterns in self.summaries.items():
                if any(fnmatchcase(name, pattern) for pattern in patterns):
                    run.define_metric(name, step_metric=AXIS, summary=summary)
        run.log(row)

    def _leave(self, error: Exception) -> None:
        """Warn and go on without W&B."""
        self._away, self._run = True, None
        log.warning("W&B is away (%s): training goes on, metrics.csv has everything", one_line(error))
        with contextlib.suppress(Exception, SystemExit):
            import wandb

            wandb.teardown(1)  # else it retries at exit, with an error instead of a warning

    def _safely(self, act: Callable[[Any], Any]) -> None:
        """Call `act` with the W&B run, if there is one; after an error go on without W&B."""
        run = self.experiment
        if self._away:
            return
        try:
            act(run)
        except Exception as error:
            self._leave(error)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any], *_: Any, **__: Any) -> None:  # noqa: ANN401
        """Log the stage's config."""
        self._safely(lambda run: run.config.update(params, allow_val_change=True))

    @rank_zero_only
    def log_facts(self, facts: Callable[[], dict[str, Any]]) -> None:
        """Log facts about the stage that are not in its config (see `ldm_lab.training.facts`)."""
        found = facts()
        self._safely(lambda run: run.config.update({"facts": found}, allow_val_change=True))

    @rank_zero_only
    def log_artifact(self, kind: str, content: str, **facts: Any) -> None:  # noqa: ANN401
        """Declare an output of the stage, identified by the hash of its content."""
        self._safely(lambda run: self._declare(run, kind, content, facts))

    @rank_zero_only
    def use_artifact(self, kind: str, content: str) -> None:
        """Declare an input of the stage."""
        self._safely(lambda run: self._declare(run, kind, content, {}, used=True))

    def _declare(self, run: Any, kind: str, content: str, facts: dict[str, Any], used: bool = False) -> None:  # noqa: ANN401
        if not self.artifacts:
            return
        try:
            tracking.declare(run, self.folder, kind, content, facts, used)
        except Exception as error:  # only artifacts stop; metrics go on
            self.artifacts = False
            log.warning("W&B takes no artifacts (%s): what was made of what is not told", one_line(error))

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Log scalars; `images_seen` among them is their x axis."""
        if AXIS not in metrics:
            return
        row = {key: value for key, value in metrics.items() if key != "epoch"}
        self._young.append(row)
        self._safely(lambda run: self._log(run, row))

    @property
    def _kept(self) -> Path:
        return self.folder / "wandb_young.json"

    @rank_zero_only
    def flush(self) -> None:
        """Save the rows that W&B may not have written yet."""
        self._safely(lambda _: write_json(self._kept, {"rows": list(self._young)}))

    @rank_zero_only
    def forget_after(self, images_seen: int) -> None:
        """Log rows again that a killed process may have lost; a resumed run measures later rows again."""

        def log_again(run: Any) -> None:  # noqa: ANN401
            rows = read_json(self._kept)["rows"] if self._kept.is_file() else []
            for row in [row for row in rows if row[AXIS] <= images_seen]:
                self._young.append(row)
                self._log(run, row)

        self._safely(log_again)

    @rank_zero_only
    def log_picture(self, name: str, picture: Image.Image, images_seen: int) -> None:
        """Log a picture under one key, so that W&B shows it over images seen."""

        def show(run: Any) -> None:  # noqa: ANN401
            import wandb

            run.log({f"pictures/{name}": wandb.Image(picture), AXIS: images_seen})

        self._safely(show)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Finish the W&B run; the next stage starts its own."""
        if self._run is not None:
            self._safely(lambda run: tracking.finish(run, exit_code=int(status == "failed")))
            self._run = None
            self._young.clear()
            self._kept.unlink(missing_ok=True)

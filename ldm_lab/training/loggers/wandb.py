"""Weights & Biases: one run a stage, grouped by the run's name; never asks, never stops a training."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

from ldm_lab.errors import one_line
from ldm_lab.records import AXIS
from ldm_lab.saving import replacing, write_json
from ldm_lab.untrusted import read_json

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger(__name__)

PLAIN_ID = re.compile(r"[a-z0-9]{1,32}")
YOUNG = 300  # rows: more than there are in the 15 seconds after which W&B writes them; a killed process loses them


class WandbLogger(Logger):
    """Logs over images seen. Online only where the user is logged in, else into `folder/wandb`.

    Whatever goes wrong, training goes on and one warning says so: a start that fails online is repeated offline, for
    `wandb sync`; where that fails too, or the service later, W&B is left alone. Nothing is waited for longer than
    `PATIENCE`. `WANDB_MODE=disabled` is respected.

    Args:
        folder: the stage's folder; keeps the run's id, so that a resumed stage continues its W&B run.
        project: the W&B project.
        group: the run's name; the stages of one run lie together.
        job_type: the stage.
        offline: never go online.
        summaries: metric -> "min" or "max", what the run's summary holds.
        **settings: further arguments of `wandb.init`, e.g. `entity` or `tags`.
    """

    PATIENCE = 60.0  # seconds, for a start and for the end

    def __init__(
        self,
        folder: str,
        project: str,
        group: str,
        job_type: str,
        offline: bool = False,
        summaries: dict[str, str] | None = None,
        **settings: Any,  # noqa: ANN401
    ) -> None:
        super().__init__()
        self.folder, self.offline, self.summaries = Path(folder), offline, summaries or {}
        self.settings = {
            "project": project, "group": group, "job_type": job_type, "name": f"{group}/{job_type}", **settings,
        }  # fmt: skip
        self._run: Any = None
        self._away = False
        self._young: deque[dict[str, float]] = deque(maxlen=YOUNG)

    @property
    def name(self) -> str:
        """The project."""
        return self.settings["project"]

    @property
    def version(self) -> str:
        """The run's id, made once and kept in the stage's folder; what is no plain id there makes place for one."""
        path = self.folder / "wandb_id"
        if path.is_file():  # a pipe would be waited for
            with open(path, encoding="utf-8", errors="replace") as file:
                if PLAIN_ID.fullmatch(found := file.read(100).strip()):
                    return found
        self.folder.mkdir(parents=True, exist_ok=True)
        new = uuid4().hex[:12]
        with replacing(path) as temporary:
            temporary.write_text(new, encoding="utf-8")
        return new

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:  # noqa: ANN401
        """The W&B run, started when first needed; Lightning makes a dummy of `None`, where W&B is away."""
        if self._run is None and not self._away:
            try:
                self._run = self._start()
            except Exception as error:  # whatever is wrong with W&B, the training goes on
                self._leave(error)
        return self._run

    def _start(self) -> Any:  # noqa: ANN401
        import wandb

        mode = "disabled" if os.environ.get("WANDB_MODE") == "disabled" else "offline"
        failure = None
        try:
            if mode == "offline" and not self.offline and wandb.login(prompt=False, verify=False):
                return self._init(None)
        except Exception as error:
            failure = error
        run = self._init(mode)
        if failure:
            log.warning("W&B cannot be reached (%s): it stays offline, in %s", one_line(failure), self.folder / "wandb")
        return run

    def _init(self, mode: str | None) -> Any:  # noqa: ANN401
        import wandb

        settings = wandb.Settings(silent=True, init_timeout=self.PATIENCE, finish_timeout=self.PATIENCE)
        run = wandb.init(
            dir=self.folder, id=self.version, resume="allow", mode=mode, settings=settings, **self.settings
        )
        run.define_metric(AXIS)
        run.define_metric("*", step_metric=AXIS)
        for metric, summary in self.summaries.items():
            run.define_metric(metric, step_metric=AXIS, summary=summary)
        return run

    def _leave(self, error: Exception) -> None:
        """Train on without W&B."""
        self._away, self._run = True, None
        log.warning("W&B is away (%s): training goes on, metrics.csv has everything", one_line(error))
        with contextlib.suppress(Exception, SystemExit):
            import wandb

            wandb.teardown(1)  # or it tries once more when the process ends, and what it says then is no warning

    def _safely(self, act: Callable[[Any], Any]) -> None:
        """Do something with the run, where there is one."""
        run = self.experiment
        if self._away:
            return
        try:
            act(run)
        except Exception as error:
            self._leave(error)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any], *_: Any, **__: Any) -> None:  # noqa: ANN401
        """The stage's config."""
        self._safely(lambda run: run.config.update(params, allow_val_change=True))

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Scalars, with `images_seen` among them as their axis."""
        if AXIS not in metrics:
            return
        row = {key: value for key, value in metrics.items() if key != "epoch"}
        self._young.append(row)
        self._safely(lambda run: run.log(row))

    @property
    def _kept(self) -> Path:
        return self.folder / "wandb_young.json"

    @rank_zero_only
    def flush(self) -> None:
        """Keep the rows that W&B may not have written yet."""
        self._safely(lambda _: write_json(self._kept, {"rows": list(self._young)}))

    @rank_zero_only
    def forget_after(self, images_seen: int) -> None:
        """Log again what may have been lost with a killed process; what comes after will be measured again."""

        def log_again(run: Any) -> None:  # noqa: ANN401
            rows = read_json(self._kept)["rows"] if self._kept.is_file() else []
            for row in [row for row in rows if row[AXIS] <= images_seen]:
                self._young.append(row)
                run.log(row)

        self._safely(log_again)

    @rank_zero_only
    def log_picture(self, name: str, picture: Image.Image, images_seen: int) -> None:
        """A picture, under one key, so that W&B shows it over images seen."""

        def show(run: Any) -> None:  # noqa: ANN401
            import wandb

            run.log({f"pictures/{name}": wandb.Image(picture), AXIS: images_seen})

        self._safely(show)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Close the run: the next stage opens its own."""
        if self._run is not None:
            self._safely(lambda run: finish(run, exit_code=int(status == "failed")))
            self._run = None
            self._young.clear()
            self._kept.unlink(missing_ok=True)


def finish(run: Any, exit_code: int) -> None:  # noqa: ANN401
    """End a run. Raises `OSError` where its service could not write all: it tells nobody but its log."""
    run.finish(exit_code=exit_code)
    said = Path(run.settings.log_internal)
    if said.is_file() and "failed to save record" in said.read_text(encoding="utf-8", errors="replace")[-100_000:]:
        raise OSError(f"not all could be written, see {said}")

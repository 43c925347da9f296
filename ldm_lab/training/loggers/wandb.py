"""Weights & Biases: one run a stage, grouped by the run's name; never asks, never stops a training."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

from ldm_lab.training.loggers.csv import AXIS

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger(__name__)


class WandbLogger(Logger):
    """Logs over images seen. Online only where the user is logged in, else into `folder/wandb`.

    Args:
        folder: the stage's folder; keeps the run's id, so that a resumed stage continues its W&B run.
        project: the W&B project.
        group: the run's name; the stages of one run lie together.
        job_type: the stage.
        offline: never go online.
        summaries: metric -> "min" or "max", what the run's summary holds.
        **settings: further arguments of `wandb.init`, e.g. `entity` or `tags`.
    """

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

    @property
    def name(self) -> str:
        """The project."""
        return self.settings["project"]

    @property
    def version(self) -> str:
        """The run's id, made once and kept in the stage's folder."""
        path = self.folder / "wandb_id"
        if not path.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            path.write_text(uuid4().hex[:12], encoding="utf-8")
        return path.read_text(encoding="utf-8").strip()

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:  # noqa: ANN401
        """The W&B run, started when first needed."""
        if self._run is None:
            self._run = self._start()
        return self._run

    def _start(self) -> Any:  # noqa: ANN401
        import wandb

        online = not self.offline and wandb.login(prompt=False, verify=False)
        run = wandb.init(
            dir=self.folder, id=self.version, resume="allow", mode=None if online else "offline",
            settings=wandb.Settings(silent=True, init_timeout=60), **self.settings,
        )  # fmt: skip
        run.define_metric(AXIS)
        run.define_metric("*", step_metric=AXIS)
        for metric, summary in self.summaries.items():
            run.define_metric(metric, step_metric=AXIS, summary=summary)
        return run

    def _safely(self, act: Callable[[Any], Any]) -> None:
        """Do something with the run; where the service fails, say so once and train on without it."""
        if self._away:
            return
        try:
            act(self.experiment)
        except Exception as error:  # whatever is wrong with W&B, the training goes on
            self._away = True
            log.warning("W&B is away (%s): training goes on, metrics.csv has everything", error)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any], *_: Any, **__: Any) -> None:  # noqa: ANN401
        """The stage's config."""
        self._safely(lambda run: run.config.update(params, allow_val_change=True))

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Scalars, with `images_seen` among them as their axis."""
        if AXIS in metrics:
            self._safely(lambda run: run.log({k: v for k, v in metrics.items() if k != "epoch"}))

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
            self._safely(lambda run: run.finish(exit_code=int(status == "failed")))
            self._run = None

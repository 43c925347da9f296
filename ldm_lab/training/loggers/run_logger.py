"""Base class of this package's loggers: pictures, facts and artifacts besides metrics."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lightning import Trainer
from lightning.pytorch.loggers.logger import Logger

if TYPE_CHECKING:
    from PIL import Image


class RunLogger(Logger):
    """A logger that may also show pictures and record artifacts; each method does nothing unless overridden."""

    def log_picture(self, name: str, picture: Image.Image, images_seen: int) -> None:
        """Show a picture."""

    def log_facts(self, facts: Callable[[], dict[str, Any]]) -> None:
        """Record facts that are not in the config (see `ldm_lab.training.facts`); making them takes seconds."""

    def log_artifact(self, kind: str, content: str, **facts: Any) -> None:  # noqa: ANN401
        """Record an output of the stage (an "autoencoder", "latents" ...), identified by the hash of its content."""

    def use_artifact(self, kind: str, content: str) -> None:
        """Record an input of the stage, identified by the hash of its content."""

    def forget_after(self, images_seen: int) -> None:
        """Drop the rows that a resumed run will log again."""

    def flush(self) -> None:
        """Write the pending rows."""


def run_loggers(trainer: Trainer) -> list[RunLogger]:
    """The `RunLogger`s among a trainer's loggers; users may add other Lightning loggers."""
    return [logger for logger in trainer.loggers if isinstance(logger, RunLogger)]

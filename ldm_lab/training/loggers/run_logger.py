"""What the loggers of this package can do beside logging metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning import Trainer
from lightning.pytorch.loggers.logger import Logger

if TYPE_CHECKING:
    from PIL import Image


class RunLogger(Logger):
    """A logger that may show pictures and know what was made of what; each method does nothing unless overridden."""

    def log_picture(self, name: str, picture: Image.Image, images_seen: int) -> None:
        """Show a picture."""

    def log_facts(self, facts: dict[str, Any]) -> None:
        """Note what the stage is made of, beside its config (see `ldm_lab.training.facts`)."""

    def log_artifact(self, kind: str, content: str, **facts: Any) -> None:  # noqa: ANN401
        """Note that the stage has made something: an "autoencoder", "latents" ..., known by the hash of its content."""

    def use_artifact(self, kind: str, content: str) -> None:
        """Note that the stage is made of something, known by the hash of its content."""

    def forget_after(self, images_seen: int) -> None:
        """Drop the rows that a resumed run is about to log again."""

    def flush(self) -> None:
        """Write the rows that are not written yet."""


def run_loggers(trainer: Trainer) -> list[RunLogger]:
    """The loggers of a run that are of this kind; users may add others of Lightning's."""
    return [logger for logger in trainer.loggers if isinstance(logger, RunLogger)]

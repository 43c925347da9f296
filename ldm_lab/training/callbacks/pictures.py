"""Pictures of a run: PNG files in its folder, and every logger that shows images."""

from __future__ import annotations

from pathlib import Path

from lightning import Trainer
from torch import Tensor

from ldm_lab.images import grid, save_png, to_uint8, to_unit
from ldm_lab.training.stage_module import StageModule


def show(
    trainer: Trainer, module: StageModule, folder: Path, name: str, images: Tensor, columns: int | None = None
) -> None:
    """Write the grid of `(B, 3, H, W)` images in [-1, 1] as `folder/name_<images seen>.png` and log it as `name`."""
    picture = grid(to_uint8(to_unit(images.float())), columns)
    save_png(picture, folder / f"{name}_{module.images_seen:09d}.png")
    for logger in trainer.loggers:
        if hasattr(logger, "log_picture"):
            logger.log_picture(name, picture, module.images_seen)

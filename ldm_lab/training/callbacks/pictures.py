"""Writes the pictures of a run as PNG files and to every logger that shows images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from lightning import Trainer
from torch import Tensor

from ldm_lab.training.loggers.run_logger import run_loggers
from ldm_lab.training.stage_module import StageModule
from ldm_lab.utils.images import grid, save_png, to_uint8, to_unit


def shared(trainer: Trainer, count: int, make: Callable[[Sequence[int]], Tensor]) -> Tensor:
    """Images `(count, 3, H, W)`, or rows of images, on every rank; each rank makes its share. All ranks must call it.

    Args:
        trainer: the run's trainer.
        count: number of images.
        make: maps n indices to `(n, 3, H, W)` or `(n, F, 3, H, W)`; no image may depend on the other indices.
    """
    each = -(-count // trainer.world_size)
    indices = [min(trainer.global_rank * each + place, count - 1) for place in range(each)]  # the last one pads
    images = make(indices).contiguous()
    if trainer.world_size == 1:
        return images
    parts = [torch.empty_like(images) for _ in range(trainer.world_size)]
    torch.distributed.all_gather(parts, images)
    return torch.cat(parts)[:count]  # (R, n, 3, H, W) -> (count, 3, H, W)


def show(
    trainer: Trainer, module: StageModule, folder: Path, name: str, images: Tensor, columns: int | None = None
) -> None:
    """Write the grid of `(B, 3, H, W)` images in [-1, 1] as `folder/name_<images seen>.png` and log it as `name`.

    Only rank 0 writes and logs; the other ranks go on.
    """
    if not trainer.is_global_zero:
        return
    picture = grid(to_uint8(to_unit(images.float())), columns)
    save_png(picture, folder / f"{name}_{module.images_seen:09d}.png")
    for logger in run_loggers(trainer):
        logger.log_picture(name, picture, module.images_seen)

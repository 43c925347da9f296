"""Pictures of a run: PNG files in its folder, and every logger that shows images."""

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
    """`count` images `(count, 3, H, W)`, or rows of them, on every rank; each has made its share. All must call it.

    Args:
        trainer: of the run.
        count: how many.
        make: indices of n images -> these, `(n, 3, H, W)` or `(n, F, 3, H, W)`, none of which may depend on the others.
    """
    each = -(-count // trainer.world_size)
    mine = [min(trainer.global_rank * each + place, count - 1) for place in range(each)]  # the last ones more than once
    images = make(mine).contiguous()
    if trainer.world_size == 1:
        return images
    parts = [torch.empty_like(images) for _ in range(trainer.world_size)]
    torch.distributed.all_gather(parts, images)
    return torch.cat(parts)[:count]  # (R, n, 3, H, W) -> (count, 3, H, W)


def show(
    trainer: Trainer, module: StageModule, folder: Path, name: str, images: Tensor, columns: int | None = None
) -> None:
    """Write the grid of `(B, 3, H, W)` images in [-1, 1] as `folder/name_<images seen>.png` and log it as `name`.

    On rank 0, while the others go on.
    """
    if not trainer.is_global_zero:
        return
    picture = grid(to_uint8(to_unit(images.float())), columns)
    save_png(picture, folder / f"{name}_{module.images_seen:09d}.png")
    for logger in run_loggers(trainer):
        logger.log_picture(name, picture, module.images_seen)

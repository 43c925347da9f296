"""Writes the pictures of a run as PNG files and to every logger that shows images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from lightning import Callback, Trainer
from torch import Tensor

from ldm_lab.diffusion import samplers
from ldm_lab.pipeline import LDMPipeline
from ldm_lab.training.callbacks.every import Every
from ldm_lab.training.device import precision_of
from ldm_lab.training.loggers.run_logger import run_loggers
from ldm_lab.training.stage_module import StageModule
from ldm_lab.utils.images import as_rgb, save_png, sheet
from ldm_lab.utils.limits import Count, Whole
from ldm_lab.utils.randomness import generators


def shared(trainer: Trainer, count: int, make: Callable[[Sequence[int]], Tensor]) -> Tensor:
    """Images `(count, C, H, W)`, or rows of images, on every rank; each rank makes its share. All ranks must call it.

    Args:
        trainer: the run's trainer.
        count: number of images.
        make: maps n indices to `(n, C, H, W)` or `(n, F, C, H, W)`; no image may depend on the other indices.
    """
    each = -(-count // trainer.world_size)
    indices = [min(trainer.global_rank * each + place, count - 1) for place in range(each)]  # the last one pads
    images = make(indices).contiguous()
    if trainer.world_size == 1:
        return images
    parts = [torch.empty_like(images) for _ in range(trainer.world_size)]
    torch.distributed.all_gather(parts, images)
    return torch.cat(parts)[:count]  # (R, n, C, H, W) -> (count, C, H, W)


def show(
    trainer: Trainer, module: StageModule, folder: Path, name: str, images: Tensor, columns: int | None = None
) -> None:
    """Show images `(B, C, H, W)` of the data in [-1, 1] by the channels of `data.preview_channels`: see `show_rgb`."""
    if trainer.is_global_zero:
        show_rgb(trainer, module, folder, name, as_rgb(images, trainer.datamodule.preview_channels), columns)


def show_rgb(
    trainer: Trainer, module: StageModule, folder: Path, name: str, images: Tensor, columns: int | None = None
) -> None:
    """Write the grid of `(B, 3, H, W)` images in [-1, 1] as `folder/name_<images seen>.png` and log it as `name`.

    Only rank 0 writes and logs; the other ranks go on.
    """
    if not trainer.is_global_zero:
        return
    picture = sheet(images.float(), columns)
    save_png(picture, folder / f"{name}_{module.images_seen:09d}.png")
    for logger in run_loggers(trainer):
        logger.log_picture(name, picture, module.images_seen)


def drawing(
    trainer: Trainer, pipe: LDMPipeline, sampler: str, steps: int, seed: int
) -> Callable[[Sequence[int]], Tensor]:
    """A function that maps n sample indices to samples `(n, C, H, W)` in [0, 1], in the trainer's precision."""
    pipe.scheduler = samplers.choose(sampler, pipe.scheduler)
    pipe.set_progress_bar_config(disable=True)

    def draw(indices: Sequence[int]) -> Tensor:
        with precision_of(trainer):
            rngs = generators(seed, indices)
            return pipe(len(indices), rngs, num_inference_steps=steps, output_type="pt").images

    return draw


class RegularSamples(Callback):
    """Base of callbacks that show samples, every so many images and at the end, always from the same noise.

    Args:
        folder: `samples/` of the stage.
        every_images: interval in training images.
        images: number of samples.
        steps: UNet evaluations per sample.
        seed: sample i is drawn from (seed, i), as in `sample.py`.
        sampler: one of `ldm_lab.diffusion.samplers.SAMPLERS`.

    Raises:
        UserError: there is no such sampler.
    """

    def __init__(
        self,
        folder: str,
        every_images: Count,
        images: Count,
        steps: Count = 20,
        seed: Whole = 0,
        sampler: str = "ddim",
    ) -> None:
        samplers.named(sampler)
        self.folder, self.every = Path(folder), Every(every_images)
        self.images, self.steps, self.seed, self.sampler = images, steps, seed, sampler

    def on_train_start(self, trainer: Trainer, module: StageModule) -> None:
        """Start the interval at the number of images seen so far."""
        self.every.start(module)

    def on_train_batch_end(self, trainer: Trainer, module: StageModule, *_: object) -> None:
        """Sample when due, and at the last step."""
        if self.every.due(trainer, module) or trainer.global_step >= trainer.max_steps:
            self.sample(trainer, module)

    def sample(self, trainer: Trainer, module: StageModule) -> None:
        """Sample and show; all ranks must call it."""
        raise NotImplementedError

"""Shows the denoising process of a few samples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from lightning import Callback, Trainer
from torch import Tensor

from ldm_lab.diffusion import samplers
from ldm_lab.diffusion.denoising import denoise
from ldm_lab.sampling.seeds import generators
from ldm_lab.training.callbacks.every import Every
from ldm_lab.training.callbacks.pictures import shared, show
from ldm_lab.training.device import precision_of
from ldm_lab.training.diffusion_module import DiffusionModule
from ldm_lab.utils.limits import Count, Whole


class DenoisingStrip(Callback):
    """Shows, every so many images and at the end, the predicted clean image at each step, one row per sample.

    The samples are the first samples of `SampleGrid` if seed, sampler and steps are the same.

    Args:
        folder: `samples/` of the stage.
        every_images: interval in training images.
        images: number of samples.
        frames: number of steps shown, evenly spaced, the last step included.
        steps: UNet evaluations per sample.
        seed: sample i is drawn from (seed, i).
        sampler: one of `ldm_lab.diffusion.samplers.SAMPLERS`.

    Raises:
        UserError: there is no such sampler.
    """

    def __init__(
        self,
        folder: str,
        every_images: Count,
        images: Count = 4,
        frames: Count = 8,
        steps: Count = 20,
        seed: Whole = 0,
        sampler: str = "ddim",
    ) -> None:
        samplers.named(sampler)
        self.folder, self.every = Path(folder), Every(every_images)
        self.images, self.frames, self.steps, self.seed, self.sampler = images, frames, steps, seed, sampler

    def on_train_start(self, trainer: Trainer, module: DiffusionModule) -> None:
        """Start the interval at the number of images seen so far."""
        self.every.start(module)

    def on_train_batch_end(self, trainer: Trainer, module: DiffusionModule, *_: object) -> None:
        """Sample when due, and at the last step."""
        if self.every.due(trainer, module) or trainer.global_step >= trainer.max_steps:
            self.draw(trainer, module)

    @torch.no_grad()
    def draw(self, trainer: Trainer, module: DiffusionModule) -> None:
        """Sample and show the rows; each rank samples its share."""
        pipe = module.pipeline()
        pipe.scheduler = samplers.choose(self.sampler, pipe.scheduler)
        shown = {round(place) for place in torch.linspace(0, self.steps - 1, min(self.frames, self.steps)).tolist()}

        def strips(indices: Sequence[int]) -> Tensor:
            rngs = generators(self.seed, indices)
            latents = pipe.noise(len(indices), rngs)  # (n, C, h, w)
            pipe.scheduler.set_timesteps(self.steps)
            with precision_of(trainer):
                frames = [
                    pipe.decode(output.pred_original_sample)
                    for step, (_, output) in enumerate(denoise(pipe.unet, pipe.scheduler, latents, rngs))
                    if step in shown
                ]
            return torch.stack(frames, dim=1)  # F x (n, 3, H, W) -> (n, F, 3, H, W)

        found = shared(trainer, self.images, strips)
        show(trainer, module, self.folder, "denoising", found.flatten(0, 1), columns=found.shape[1])

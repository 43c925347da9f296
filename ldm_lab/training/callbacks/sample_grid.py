"""What the diffusion model draws."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from lightning import Callback, Trainer
from torch import Tensor

from ldm_lab import randomness
from ldm_lab.diffusion import samplers
from ldm_lab.training.callbacks.every import Every
from ldm_lab.training.callbacks.pictures import shared, show
from ldm_lab.training.diffusion_module import DiffusionModule


class SampleGrid(Callback):
    """Every so many images and at the end, samples of the averaged weights, always from the same noise.

    Args:
        folder: `samples/` of the stage.
        every_images: interval in training images.
        images: how many samples.
        steps: evaluations of the UNet for a sample.
        seed: sample i is drawn from (seed, i), as in `sample.py`.
        sampler: one of `ldm_lab.diffusion.samplers.SAMPLERS`.

    Raises:
        ValueError: there is no such sampler.
    """

    def __init__(
        self,
        folder: str,
        every_images: int,
        images: int = 36,
        steps: int = 20,
        seed: int = 0,
        sampler: str = "ddim",
    ) -> None:
        samplers.named(sampler)
        self.folder, self.every = Path(folder), Every(every_images)
        self.images, self.steps, self.seed, self.sampler = images, steps, seed, sampler

    def on_train_start(self, trainer: Trainer, module: DiffusionModule) -> None:
        """Begin to count."""
        self.every.start(module)

    def on_train_batch_end(self, trainer: Trainer, module: DiffusionModule, *_: object) -> None:
        """Sample when due, and at the last step."""
        if self.every.due(trainer, module) or trainer.global_step >= trainer.max_steps:
            self.sample(trainer, module)

    def sample(self, trainer: Trainer, module: DiffusionModule) -> None:
        """Sample, each rank its share."""
        pipe = module.pipeline()
        pipe.scheduler = samplers.choose(self.sampler, pipe.scheduler)
        pipe.set_progress_bar_config(disable=True)

        def draw(indices: Sequence[int]) -> Tensor:
            generators = [randomness.generator(self.seed, "sample", index) for index in indices]
            with torch.autocast(module.device.type, torch.bfloat16, enabled=trainer.precision == "bf16-mixed"):
                return pipe(len(indices), generators, num_inference_steps=self.steps, output_type="pt").images

        show(trainer, module, self.folder, "samples", shared(trainer, self.images, draw) * 2 - 1)

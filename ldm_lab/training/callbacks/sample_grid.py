"""Shows samples of the diffusion model during training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lightning import Callback, Trainer
from torch import Tensor

from ldm_lab.diffusion import samplers
from ldm_lab.pipeline import LDMPipeline
from ldm_lab.sampling.seeds import generators
from ldm_lab.training.callbacks.every import Every
from ldm_lab.training.callbacks.pictures import shared, show
from ldm_lab.training.device import precision_of
from ldm_lab.training.diffusion_module import DiffusionModule
from ldm_lab.training.neighbours import Neighbours
from ldm_lab.utils.limits import Count, Whole


class SampleGrid(Callback):
    """Shows, every so many images and at the end, samples of the averaged weights, always from the same noise.

    On request it also shows samples of the raw weights from the same noise, and the nearest training images of the
    first samples.

    Args:
        folder: `samples/` of the stage.
        every_images: interval in training images.
        images: number of samples.
        steps: UNet evaluations per sample.
        seed: sample i is drawn from (seed, i), as in `sample.py`.
        sampler: one of `ldm_lab.diffusion.samplers.SAMPLERS`.
        raw: number of samples of the raw (not averaged) weights; 0: none.
        neighbours: finds the nearest training images; None: no search.

    Raises:
        UserError: there is no such sampler.
    """

    def __init__(
        self,
        folder: str,
        every_images: Count,
        images: Count = 36,
        steps: Count = 20,
        seed: Whole = 0,
        sampler: str = "ddim",
        raw: Whole = 0,
        neighbours: Neighbours | None = None,
    ) -> None:
        samplers.named(sampler)
        self.folder, self.every = Path(folder), Every(every_images)
        self.images, self.steps, self.seed, self.sampler = images, steps, seed, sampler
        self.raw, self.neighbours = raw, neighbours

    def on_train_start(self, trainer: Trainer, module: DiffusionModule) -> None:
        """Start the interval at the number of images seen so far."""
        self.every.start(module)

    def on_train_batch_end(self, trainer: Trainer, module: DiffusionModule, *_: object) -> None:
        """Sample when due, and at the last step."""
        if self.every.due(trainer, module) or trainer.global_step >= trainer.max_steps:
            self.sample(trainer, module)

    def sample(self, trainer: Trainer, module: DiffusionModule) -> None:
        """Sample, and show samples, neighbours and samples of the raw weights."""
        pipe = module.pipeline()
        samples = self._draw(trainer, pipe, self.images)
        show(trainer, module, self.folder, "samples", samples)
        if self.neighbours is not None:
            rows = self.neighbours.beside(trainer, samples)  # (n, 1 + k, 3, H, W)
            show(trainer, module, self.folder, "neighbours", rows.flatten(0, 1), columns=rows.shape[1])
        if self.raw:
            module.unet.eval()
            raw = self._draw(trainer, LDMPipeline(pipe.vqvae, module.unet, module.scheduler), self.raw)
            module.unet.train()
            show(trainer, module, self.folder, "samples_raw", raw)

    def _draw(self, trainer: Trainer, pipe: LDMPipeline, count: int) -> Tensor:
        """The first `count` samples, `(count, 3, H, W)` in [-1, 1]; each rank computes its share."""
        pipe.scheduler = samplers.choose(self.sampler, pipe.scheduler)
        pipe.set_progress_bar_config(disable=True)

        def draw(indices: Sequence[int]) -> Tensor:
            rngs = generators(self.seed, indices)
            with precision_of(trainer):
                return pipe(len(indices), rngs, num_inference_steps=self.steps, output_type="pt").images

        return shared(trainer, count, draw) * 2 - 1

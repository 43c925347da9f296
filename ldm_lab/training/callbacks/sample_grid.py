"""Shows samples of the diffusion model during training."""

from __future__ import annotations

from typing import Any

from lightning import Trainer
from torch import Tensor

from ldm_lab.pipeline import LDMPipeline
from ldm_lab.training.callbacks.pictures import RegularSamples, drawing, shared, show
from ldm_lab.training.diffusion_module import DiffusionModule
from ldm_lab.training.neighbours import Neighbours
from ldm_lab.utils.limits import Count, Whole


class SampleGrid(RegularSamples):
    """Shows, every so many images and at the end, samples of the averaged weights, always from the same noise.

    On request it also shows samples of the raw weights from the same noise, and the nearest training images of the
    first samples.

    Args:
        folder: `samples/` of the stage.
        every_images: interval in training images.
        images: number of samples.
        raw: number of samples of the raw (not averaged) weights; 0: none.
        neighbours: finds the nearest training images; None: no search.
        **sampling: see `RegularSamples`.
    """

    def __init__(
        self,
        folder: str,
        every_images: Count,
        images: Count = 36,
        raw: Whole = 0,
        neighbours: Neighbours | None = None,
        **sampling: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(folder, every_images, images, **sampling)
        self.raw, self.neighbours = raw, neighbours

    def sample(self, trainer: Trainer, module: DiffusionModule) -> None:
        """Sample, and show samples, neighbours and samples of the raw weights."""
        pipe = module.pipeline()
        samples = self._draw(trainer, pipe, self.images)
        show(trainer, module, self.folder, "samples", samples)
        if self.neighbours is not None:
            rows = self.neighbours.beside(trainer, samples)  # (n, 1 + k, C, H, W)
            show(trainer, module, self.folder, "neighbours", rows.flatten(0, 1), columns=rows.shape[1])
        if self.raw:
            module.unet.eval()
            raw = self._draw(trainer, LDMPipeline(pipe.vqvae, module.unet, module.scheduler), self.raw)
            module.unet.train()
            show(trainer, module, self.folder, "samples_raw", raw)

    def _draw(self, trainer: Trainer, pipe: LDMPipeline, count: int) -> Tensor:
        """The first `count` samples, `(count, C, H, W)` in [-1, 1]; each rank computes its share."""
        return shared(trainer, count, drawing(trainer, pipe, self.sampler, self.steps, self.seed)) * 2 - 1

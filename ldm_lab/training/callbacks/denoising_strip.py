"""Shows the denoising process of a few samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning import Trainer
from torch import Tensor

from ldm_lab.diffusion import samplers
from ldm_lab.sampling.pictures import denoising
from ldm_lab.training.callbacks.pictures import RegularSamples, shared, show
from ldm_lab.training.device import precision_of
from ldm_lab.training.diffusion_module import DiffusionModule
from ldm_lab.utils.limits import Count


class DenoisingStrip(RegularSamples):
    """Shows, every so many images and at the end, the predicted clean image at each step, one row per sample.

    The samples are the first samples of `SampleGrid` if seed, sampler and steps are the same.

    Args:
        folder: `samples/` of the stage.
        every_images: interval in training images.
        images: number of samples.
        frames: number of steps shown, evenly spaced, the last step included.
        **sampling: see `RegularSamples`.
    """

    def __init__(
        self,
        folder: str,
        every_images: Count,
        images: Count = 4,
        frames: Count = 8,
        **sampling: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(folder, every_images, images, **sampling)
        self.frames = frames

    def sample(self, trainer: Trainer, module: DiffusionModule) -> None:
        """Sample and show the rows; each rank samples its share."""
        pipe = module.pipeline()
        pipe.scheduler = samplers.choose(self.sampler, pipe.scheduler)

        def strips(indices: Sequence[int]) -> Tensor:
            with precision_of(trainer):
                frames = denoising(pipe, indices, self.seed, self.steps, most=self.frames)
            return frames.transpose(0, 1)  # (F, n, C, H, W) -> (n, F, C, H, W)

        found = shared(trainer, self.images, strips)
        show(trainer, module, self.folder, "denoising", found.flatten(0, 1), columns=found.shape[1])

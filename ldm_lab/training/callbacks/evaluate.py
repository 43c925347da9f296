"""How far samples are from the training images, while training goes on."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from lightning import Callback, Trainer
from torch import Tensor

from ldm_lab.diffusion import samplers
from ldm_lab.metrics import distribution, features
from ldm_lab.metrics.extractors import CHUNK, exactly
from ldm_lab.metrics.images import DataPixels
from ldm_lab.sampling.seeds import generators
from ldm_lab.training.callbacks.every import Every
from ldm_lab.training.device import precision_of
from ldm_lab.training.diffusion_module import DiffusionModule
from ldm_lab.utils.errors import UserError
from ldm_lab.utils.limits import Count, Whole


class EvaluateSamples(Callback):
    """Logs `eval/<metric>` of samples of the averaged weights, always from the same noise, against training images.

    With the first validation after every so many images, and the last one. Extractor and features of the training
    images are made when training starts; each rank takes its share. Figures of a few hundred samples are for comparing
    the states of a run, and of runs alike: `python -m ldm_lab evaluate` makes those to report.

    Args:
        every_images: interval in training images; `None`: never.
        cache_dir: where extractors are kept.
        features: one of `ldm_lab.metrics.features.FEATURES`.
        weights: file of pretrained ones; None: from torch's hub.
        num_samples: how many; more than `ldm_lab.metrics.distribution.NEAREST_DENSITY`.
        num_reference: training images that they are compared with, at most.
        sampler: one of `ldm_lab.diffusion.samplers.SAMPLERS`.
        steps: evaluations of the UNet for a sample.
        seed: sample i is drawn from (seed, i), as in `sample.py`.

    Raises:
        UserError: there are no such features or sampler, or a number is too small.
    """

    def __init__(
        self,
        every_images: Count | None,
        cache_dir: str,
        features: str = features.OWN,
        weights: str | None = None,
        num_samples: Count = 512,
        num_reference: Count = 10_000,
        sampler: str = "ddim",
        steps: Count = 20,
        seed: Whole = 0,
    ) -> None:
        if every_images is not None and every_images < 1:
            raise UserError(f"every_images={every_images}: must be at least 1, or null for none")
        self.every = Every(every_images or sys.maxsize)
        self.enabled = every_images is not None
        self.settings = (features, weights)
        self.cache_dir, self.num_samples, self.num_reference = cache_dir, num_samples, num_reference
        self.sampler, self.steps, self.seed = sampler, steps, seed
        self.check()

    def check(self) -> None:
        """Raise `UserError` for settings that cannot be."""
        samplers.named(self.sampler)
        features.check(*self.settings)
        if self.num_samples <= distribution.NEAREST_DENSITY:
            least = distribution.NEAREST_DENSITY + 1
            raise UserError(f"num_samples={self.num_samples}: {least} are the least that have neighbours")

    def setup(self, trainer: Trainer, module: DiffusionModule, stage: str) -> None:
        """Make the extractor, before any step: where it cannot be had, nothing is trained."""
        if self.enabled:
            known = DataPixels(trainer.datamodule.train_set, "training images")
            self.extractor = features.make(*self.settings, known, self.cache_dir, trainer.strategy.root_device)
            self.real: Tensor | None = None

    def on_train_start(self, trainer: Trainer, module: DiffusionModule) -> None:
        """Begin to count."""
        self.every.start(module)

    def on_validation_epoch_end(self, trainer: Trainer, module: DiffusionModule) -> None:
        """Sample, measure and log, when due."""
        if not self.enabled or not (self.every.crossed(module) or trainer.global_step >= trainer.max_steps):
            return
        self.every.start(module)
        extractor = self.extractor.to(module.device)
        with exactly(module.device):
            if self.real is None:
                images = DataPixels(trainer.datamodule.train_set, "training images", self.num_reference)
                self.real = self.shared(trainer, len(images), lambda places: torch.stack([images[p] for p in places]))
            generated = self.shared(trainer, self.num_samples, self.drawing(trainer, module))
        scores = distribution.manifold(generated, self.real, draws=0)
        scores["kid"] = distribution.kid(generated, self.real, draws=0)
        scores[extractor.distance] = distribution.frechet(generated, distribution.gaussian(self.real), draws=0)
        for name, one in scores.items():
            module.log(f"eval/{name}", one.value, batch_size=1)  # the same on all ranks, and on their hosts

    def shared(self, trainer: Trainer, count: int, make: Callable[[range], Tensor]) -> Tensor:
        """Features of `count` images `(count, D)`, on every rank's host; each has computed its share.

        Args:
            trainer: of the run.
            count: how many.
            make: places of n images -> these, `(n, 3, H, W)`, uint8.
        """
        device = trainer.strategy.root_device
        found = torch.zeros(count, self.extractor.dimension, device=device)
        for start in range(0, count, CHUNK)[trainer.global_rank :: trainer.world_size]:
            places = range(start, min(start + CHUNK, count))
            found[places.start : places.stop] = self.extractor(make(places).to(device))
        return trainer.strategy.reduce(found, reduce_op="sum").cpu()

    def drawing(self, trainer: Trainer, module: DiffusionModule) -> Callable[[range], Tensor]:
        """What draws samples of these places: `(n, 3, H, W)`, uint8."""
        pipe = module.pipeline()
        pipe.scheduler = samplers.choose(self.sampler, pipe.scheduler)
        pipe.set_progress_bar_config(disable=True)

        def draw(places: range) -> Tensor:
            own = generators(self.seed, places)
            with precision_of(trainer):
                images = pipe(len(places), own, num_inference_steps=self.steps, output_type="pt").images
            return (images * 255).round().to(torch.uint8)  # as they would be saved

        return draw

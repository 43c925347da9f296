"""Computes generative metrics (`eval/<metric>`) during training."""

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
from ldm_lab.training.callbacks.every import Every
from ldm_lab.training.callbacks.pictures import drawing
from ldm_lab.training.diffusion_module import DiffusionModule
from ldm_lab.utils.errors import UserError
from ldm_lab.utils.limits import Count, Whole


class EvaluateSamples(Callback):
    """Logs `eval/<metric>` of samples of the averaged weights, always from the same noise, against training images.

    Runs with the first validation after every so many images, and with the last validation. The first evaluation also
    computes the features of the training images. Each rank takes its share. Metrics of a few hundred samples serve only
    to compare states of a run, or similar runs: `python -m ldm_lab evaluate` computes metrics to report.

    Args:
        every_images: interval in training images; `None`: never.
        cache_dir: folder of the extractors' weights.
        features: one of `ldm_lab.metrics.features.FEATURES`.
        weights: file of pretrained weights; None: from torch's hub.
        num_samples: number of samples; more than `ldm_lab.metrics.distribution.NEAREST_DENSITY`.
        num_reference: maximum number of training images to compare with.
        sampler: one of `ldm_lab.diffusion.samplers.SAMPLERS`.
        steps: UNet evaluations per sample.
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
        """Raise `UserError` for invalid settings."""
        samplers.named(self.sampler)
        features.check(*self.settings)
        if self.num_samples <= distribution.NEAREST_DENSITY:
            least = distribution.NEAREST_DENSITY + 1
            raise UserError(f"num_samples={self.num_samples}: {least} are the least that have neighbours")

    def setup(self, trainer: Trainer, module: DiffusionModule, stage: str) -> None:
        """Load the extractor before the first step, so that a missing extractor stops the run early."""
        if self.enabled:
            known = DataPixels(trainer.datamodule.train_set, "training images")
            features.check(*self.settings, known.pixels.channels)
            self.extractor = features.make(*self.settings, known, self.cache_dir, trainer.strategy.root_device)
            self.real: Tensor | None = None

    def on_train_start(self, trainer: Trainer, module: DiffusionModule) -> None:
        """Start the interval at the number of images seen so far."""
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
            module.log(f"eval/{name}", one.value, batch_size=1)  # all ranks have the same value, on the CPU

    def shared(self, trainer: Trainer, count: int, make: Callable[[range], Tensor]) -> Tensor:
        """Features of `count` images `(count, D)`, on the CPU of every rank; each rank computes its share.

        Args:
            trainer: the run's trainer.
            count: number of images.
            make: maps the indices of n images to the images `(n, C, H, W)` of `Pixels`.
        """
        device = trainer.strategy.root_device
        found = torch.zeros(count, self.extractor.dimension, device=device)
        for start in range(0, count, CHUNK)[trainer.global_rank :: trainer.world_size]:
            places = range(start, min(start + CHUNK, count))
            found[places.start : places.stop] = self.extractor(make(places).to(device))
        return trainer.strategy.reduce(found, reduce_op="sum").cpu()

    def drawing(self, trainer: Trainer, module: DiffusionModule) -> Callable[[range], Tensor]:
        """A function that maps n sample indices to samples `(n, C, H, W)`, as their files would store them."""
        draw = drawing(trainer, module.pipeline(), self.sampler, self.steps, self.seed)
        if not trainer.datamodule.pixels.is_picture:
            return lambda places: draw(places) * 2 - 1
        return lambda places: (draw(places) * 255).round().to(torch.uint8)

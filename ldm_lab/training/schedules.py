"""Learning-rate schedules: multipliers of the optimizer's rate as functions of the training images seen.

Counting in images makes them independent of batch size, number of devices and gradient accumulation:
`LambdaLR(optimizer, lambda step: schedule(step * global_batch_size))`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from ldm_lab.utils.errors import UserError
from ldm_lab.utils.limits import Count, Harmless, Whole

WARMUP_START = 1e-6  # multiplier of the first step, as in latent diffusion's lsun_churches experiment


@dataclass(frozen=True)
class ConstantWithWarmup:
    """Linear from 1e-6 to 1 over `warmup_images`, then 1.

    Latent diffusion trained lsun_churches with 10,000 warm-up steps of 96 images: `warmup_images=960_000`.
    """

    warmup_images: Whole = 0

    def __post_init__(self) -> None:
        _check(self.warmup_images)

    def __call__(self, images_seen: int) -> float:
        """The multiplier after `images_seen` images."""
        return _warmup(images_seen, self.warmup_images)


@dataclass(frozen=True)
class _Falling:
    """Linear from 1e-6 to 1 over `warmup_images`, then `fall` until `max_images`.

    A run with fewer images than the warm-up ends within the warm-up.
    """

    warmup_images: Whole
    max_images: Annotated[Count, Harmless]

    def __post_init__(self) -> None:
        _check(self.warmup_images)

    def __call__(self, images_seen: int) -> float:
        """The multiplier after `images_seen` images."""
        if images_seen < self.warmup_images:
            return _warmup(images_seen, self.warmup_images)
        length = max(self.max_images - self.warmup_images, 1)
        return self.fall(min((images_seen - self.warmup_images) / length, 1.0))

    def fall(self, progress: float) -> float:
        """The multiplier at a fraction of the images after the warm-up, from 0 to 1."""
        raise NotImplementedError


@dataclass(frozen=True)
class CosineWithWarmup(_Falling):
    """Linear from 1e-6 to 1 over `warmup_images`, then half a cosine down to `final` at `max_images`.

    Loshchilov & Hutter 2017 (arXiv 1608.03983, Eq. 5), a single cycle. After `max_images` it stays at `final`.
    """

    final: float = 0.0

    def fall(self, progress: float) -> float:
        """See `_Falling.fall`."""
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * progress)) / 2


@dataclass(frozen=True)
class LinearWithWarmup(_Falling):
    """Linear from 1e-6 to 1 over `warmup_images`, then linear down to 0 at `max_images`; 0 after that.

    Bergsma et al. 2025 (arXiv 2502.15938): a rate that falls straight to zero beats half a cosine to a tenth.
    """

    def fall(self, progress: float) -> float:
        """See `_Falling.fall`."""
        return 1 - progress


def _check(warmup_images: int) -> None:
    if warmup_images < 0:
        raise UserError(f"warmup_images={warmup_images}: must not be negative")


def _warmup(images_seen: int, warmup_images: int) -> float:
    """Linear from `WARMUP_START` to 1, then 1."""
    if images_seen >= warmup_images:
        return 1.0
    return WARMUP_START + (1 - WARMUP_START) * images_seen / warmup_images

"""Equivariance of latents under scaling and quarter turns: EQ-VAE (Kouzelis et al. 2025, arXiv 2502.09509)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm_lab.utils.arguments import require
from ldm_lab.utils.limits import Probability
from ldm_lab.utils.randomness import generator

OFF = {"probability": 0.0}
SCALES = tuple(part / 32 for part in range(8, 32))  # 0.25 to 0.97


@dataclass(frozen=True)
class Transform:
    """A resampling and a turn, of the latents of a batch and of the images that they decode to.

    Attributes:
        size: (height, width) of the latents after resampling, before the turn; None: no resampling.
        turns: quarter turns, counter-clockwise.
    """

    size: tuple[int, int] | None = None
    turns: int = 0

    def latents(self, latents: Tensor) -> Tensor:
        """`(B, C, h, w)` -> `(B, C, *size)`, or `(B, C, *reversed(size))` after an odd number of turns."""
        return self._apply(latents, self.size)

    def images(self, images: Tensor, factor: int) -> Tensor:
        """Images `(B, C, H, W)` -> those that the decoder should make of the latents: `factor` times their sides."""
        return self._apply(images, self.size and (factor * self.size[0], factor * self.size[1]))

    def _apply(self, maps: Tensor, size: tuple[int, int] | None) -> Tensor:
        if size is not None and size != maps.shape[-2:]:
            # In float32, as autocast leaves latents in lower precision.
            resampled = F.interpolate(maps.float(), size, mode="bilinear", antialias=True)
            maps = resampled.to(maps.dtype)
        return torch.rot90(maps, self.turns, dims=(-2, -1)) if self.turns else maps


UNCHANGED = Transform()


class Equivariance:
    """Draws which steps train on transformed latents, and how these are transformed.

    A decoder D that must reconstruct the transformed image from the transformed latents of the original image,

        D(t E(x)) = t x,

    makes the encoder E equivariant (Kouzelis et al. 2025, section 3.2; scales also Skorokhodov et al. 2025, arXiv
    2502.14831): the latents lose the high frequencies that stand for nothing in the image, and diffusion learns them
    sooner. Here t resamples by s from {8, ..., 31} / 32 and turns by one to three quarters. The paper also trains on
    smaller images without a transform of latents; this class does not.

    Args:
        probability: of a transform in a step; 0: off.

    Raises:
        UserError: the probability is outside of [0, 1].
    """

    def __init__(self, probability: Probability = 0.0) -> None:
        require(0 <= probability <= 1, "equivariance.probability", probability, "from 0 to 1")
        self.probability = probability

    def draw(self, seed: int, step: int, size: tuple[int, int], smallest: int = 1) -> Transform:
        """The transform of a step, a function of (seed, step): equal on all ranks and for all micro-batches.

        Args:
            seed: seed of the run.
            step: number of the step.
            size: (height, width) of the latents.
            smallest: least side of the resampled latents. Scales that give less are not drawn; if all do, latents are
                turned only.
        """
        random = generator(seed, "equivariance", step)
        if torch.rand((), generator=random, device="cpu") >= self.probability:
            return UNCHANGED
        sizes = [found for found in (scaled(size, scale) for scale in SCALES) if min(found) >= smallest]
        place, turns = (int(torch.randint(n, (), generator=random, device="cpu")) for n in (max(1, len(sizes)), 3))
        return Transform(sizes[place] if sizes else None, 1 + turns)


def scaled(size: tuple[int, int], scale: float) -> tuple[int, int]:
    """(height, width) times a scale, rounded."""
    return round(size[0] * scale), round(size[1] * scale)

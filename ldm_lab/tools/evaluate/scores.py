"""Computes metrics from features."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ldm_lab.metrics import distribution
from ldm_lab.metrics.distribution import NEAREST_DENSITY, Estimate, Gaussian
from ldm_lab.metrics.images import Pixels
from ldm_lab.metrics.reference import Reference
from ldm_lab.utils.errors import UserError
from ldm_lab.utils.images import grid, save_png, tile

COPY_QUANTILE = 0.01  # quantile of held-out images' distances below which a sample is a near-copy
PAIRS = 16  # pairs on the sheet of neighbours
Scores = dict[str, Estimate]


def compare(features: Tensor, reference: Reference, distance: str, draws: int, seed: int = 0) -> Scores:
    """All metrics of a set of images against real images.

    Args:
        features: `(N, D)`.
        reference: the real images.
        distance: name of the Fréchet distance.
        draws: replicates of the bootstrap.
        seed: seed of the bootstrap.

    Raises:
        UserError: fewer than two images.
    """
    statistics = Gaussian(*(part.to(features.device) for part in reference.gaussian))
    scores = {distance: distribution.frechet(features, statistics, draws, seed)}
    real = reference.features
    if real is not None:
        real = real.to(features.device)
        scores["kid"] = distribution.kid(features, real, draws, seed)
        if min(len(features), len(real)) > NEAREST_DENSITY:
            scores |= distribution.manifold(features, real, draws, seed)
    return scores


def require_two(images: int) -> None:
    """Raise `UserError` for fewer than two images, which have no covariance."""
    if images < 2:
        raise UserError(f"{images} image(s): a distribution needs two at the very least, and a good figure thousands")


def caution(images: int, dimension: int) -> str | None:
    """A warning if there are too few images for the number of features."""
    if images >= dimension:
        return None
    return (
        f"warning: {images:,} images for {dimension:,} features: their covariance is singular and the Fréchet distance"
        " far too large; compare it with figures of the same number of images alone, or see kid"
    )


def unlike(jpeg: float | None, real: float | None) -> str | None:
    """A warning if one set of images was JPEG-compressed and the other was not: see `Pixels.jpeg`.

    Parmar et al. 2022, "On Aliased Resizing and Surprising Subtleties in GAN Evaluation", section 4.
    """
    if jpeg is None or real is None or abs(jpeg - real) <= 0.5:
        return None
    these, those = ("JPEG files", "not") if jpeg > real else ("no JPEG files", "")
    return (
        f"warning: the images are {these} and the real ones are {those or 'JPEG files'}: compression alone moves these"
        " figures (Parmar et al. 2022); compare files of one kind"
    )


def memorised(samples: Tensor, train: Tensor, held_out: Tensor, draws: int, seed: int = 0) -> tuple[Scores, Tensor]:
    """Memorisation: distances of samples to their nearest training images, relative to those of held-out images.

    `near_copies` is the fraction of samples whose distance is below the `COPY_QUANTILE` of held-out images' distances;
    without memorisation it is about that quantile. `neighbour_distance` is the ratio of the median distances of samples
    and of held-out images: about 1, and 0 for copies.

    Args:
        samples: features `(N, D)`.
        train: features `(M, D)`.
        held_out: features `(H, D)`.
        draws: replicates of the bootstrap.
        seed: seed of the bootstrap.

    Returns:
        The metrics, and for each sample the distance and index of its nearest training image, `(N, 2)`.
    """
    distances, neighbours = distribution.nearest(samples, train)
    usual = distribution.nearest(held_out, train)[0]
    copies = distances < torch.quantile(usual, COPY_QUANTILE)
    scores = {
        "near_copies": distribution.mean(copies, draws, seed),
        "neighbour_distance": Estimate(float(distances.median() / usual.median())),
    }
    return scores, torch.stack([distances, neighbours.double()], dim=1)


def neighbour_sheet(found: Tensor, samples: Pixels, train: Pixels, path: Path) -> None:
    """Write the samples nearest to training images, each beside its neighbour, the nearest first.

    Args:
        found: for each sample the distance and index of its nearest training image: `(N, 2)`.
        samples: the samples.
        train: the training images.
        path: path of the PNG file.
    """
    order = found[:, 0].argsort()[:PAIRS].tolist()
    pairs = [image for sample in order for image in (samples[sample], train[int(found[sample, 1])])]
    save_png(grid([tile(image) for image in pairs], columns=8), path)

"""Distances between two sets of images, on their features `(N, D)`: Fréchet distance, KID, precision, recall ...

All sums are float64. Intervals are bootstrap intervals (Efron & Tibshirani 1993, chapter 13) over the generated
images; for recall and coverage over the real images. They stay in the range of their metric. They measure the
variance of a value, not its bias.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ldm_lab.utils import randomness
from ldm_lab.utils.errors import UserError

LEVEL = 0.95  # confidence level of intervals
NEAREST = 3  # neighbours for precision and recall, as in Kynkäänniemi et al. 2019
NEAREST_DENSITY = 5  # ... and for density and coverage, as in Naeem et al. 2020
BLOCK = 2**24  # distances in memory at a time


class Estimate(NamedTuple):
    """A value, and the ends of its interval if it has one."""

    value: float
    low: float | None = None
    high: float | None = None


class Gaussian(NamedTuple):
    """Mean `(D,)` and covariance `(D, D)` of features, float64."""

    mean: Tensor
    covariance: Tensor


def gaussian(features: Tensor) -> Gaussian:
    """Mean and unbiased covariance of features `(N, D)`. Raises `UserError` for fewer than two."""
    if len(features) < 2:
        raise UserError(f"{len(features)} image(s) have no covariance: give two or more")
    features = features.double()
    return Gaussian(features.mean(0), features.T.cov())


def frechet_distance(one: Gaussian, other: Gaussian) -> float:
    """‖μ₁ - μ₂‖² + Tr(Σ₁ + Σ₂ - 2 (Σ₁ Σ₂)^½): Heusel et al. 2017, Eq. 6; Dowson & Landau 1982.

    The trace of the root equals that of (S Σ₂ S)^½ with S = Σ₁^½, which is symmetric and so has real eigenvalues.
    """
    root = _root(one.covariance)
    return _frechet(other, one, (root @ other.covariance @ root))


def _frechet(one: Gaussian, other: Gaussian, product: Tensor) -> float:
    roots = _nonnegative(torch.linalg.eigvalsh(product)).sqrt()
    traces = one.covariance.trace() + other.covariance.trace() - 2 * roots.sum()
    return max(0.0, float((one.mean - other.mean).square().sum() + traces))  # rounding may make it negative


def _root(covariance: Tensor) -> Tensor:
    """The symmetric square root of a symmetric, positive semidefinite matrix."""
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * _nonnegative(values).sqrt()) @ vectors.T


def _nonnegative(values: Tensor) -> Tensor:
    """Eigenvalues with rounding errors set to zero, as the square root of a rounding error is not small."""
    noise = values.abs().max() * len(values) * torch.finfo(values.dtype).eps
    return torch.where(values > noise, values, 0)


def frechet(features: Tensor, reference: Gaussian, draws: int = 200, seed: int = 0) -> Estimate:
    """The Fréchet distance of features `(N, D)` to a reference.

    Its bias falls as 1/N, so values of different N are not comparable (Bińkowski et al. 2018, section 4).

    Args:
        features: features of the images.
        reference: mean and covariance of the reference.
        draws: replicates of the bootstrap; 0: no interval.
        seed: seed of the bootstrap.
    """
    features = features.double()
    value, root = frechet_distance(gaussian(features), reference), _root(reference.covariance)
    found = []
    for weights in _resampled(len(features), draws, seed, features.device):
        replicate = _weighted(features, weights)
        found.append(_frechet(replicate, reference, root @ replicate.covariance @ root))
    estimate = _centred(value, found)
    return estimate if estimate.low is None else estimate._replace(low=max(0.0, estimate.low))  # distances are >= 0


def _weighted(features: Tensor, weights: Tensor) -> Gaussian:
    """Mean and covariance with image i repeated `weights[i]` times."""
    count = weights.sum()
    mean = weights @ features / count
    around = features - mean
    return Gaussian(mean, (around * weights[:, None]).T @ around / (count - 1))  # (D, N) @ (N, D)


def kid(features: Tensor, reference: Tensor, draws: int = 200, seed: int = 0) -> Estimate:
    """Kernel distance (KID): the unbiased estimate of MMD² with k(x, y) = (x·y / D + 1)³, over all pairs.

    Bińkowski et al. 2018, Eq. 4. It is unbiased for any N, so it may be slightly negative. Replicates exclude pairs of
    an image and its own copy, which would count as neighbours.

    Args:
        features: `(N, D)`, of the images.
        reference: `(M, D)`, of the reference.
        draws: replicates of the bootstrap; 0: no interval.
        seed: seed of the bootstrap.
    """
    x, y = features.double(), reference.double()
    rows = [x.new_ones(len(x)), *_resampled(len(x), draws, seed, x.device)]
    weights = torch.stack(rows, dim=1)  # (N, 1 + draws)
    within, across = x.new_zeros(len(rows)), x.new_zeros(len(rows))
    for start, block in _blocks(x, len(x)):
        counts = weights[start : start + len(block)]
        kernel = _kernel(block, x)
        diagonal = kernel.diagonal(start)  # k(xᵢ, xᵢ)
        within += (counts * (kernel @ weights)).sum(0) - (counts.square() * diagonal[:, None]).sum(0)
        across += counts.T @ _mean_kernel(block, y)
    among = sum(
        _kernel(block, y).sum() - _kernel(block, y).diagonal(start).sum() for start, block in _blocks(y, len(y))
    )
    pairs = weights.sum(0).square() - weights.square().sum(0)
    values = within / pairs + among / (len(y) * (len(y) - 1)) - 2 * across / len(x)
    return _centred(float(values[0]), values[1:].tolist())


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _mean_kernel(x: Tensor, y: Tensor) -> Tensor:
    """The mean of k(xᵢ, y) over all y: `(n,)`."""
    return sum(_kernel(x, block).sum(1) for _, block in _blocks(y, len(x))) / len(y)


def manifold(features: Tensor, reference: Tensor, draws: int = 200, seed: int = 0) -> dict[str, Estimate]:
    """Precision and recall (Kynkäänniemi et al. 2019, Eqs. 1 and 2), density and coverage (Naeem et al. 2020).

    Each image of a set has a ball that reaches to its k-th neighbour in the set. Precision: fraction of generated
    images inside a ball of a real image; recall: of real images inside a ball of a generated image; density: mean
    number of real balls around a generated image, over k; coverage: fraction of real balls with a generated image.

    Args:
        features: `(N, D)`, of generated images; more than `NEAREST_DENSITY`.
        reference: `(M, D)`, of real images; more than `NEAREST_DENSITY`.
        draws: replicates of the bootstrap; 0: no intervals.
        seed: seed of the bootstrap.

    Raises:
        UserError: too few images.
    """
    fewest = min(len(features), len(reference))
    if fewest <= NEAREST_DENSITY:
        raise UserError(f"{fewest} images have not {NEAREST_DENSITY} neighbours: give more")
    x, y = features.double(), reference.double()
    generated, (real, real_wide) = _radii(x)[0], _radii(y)
    precision, density = [], []
    recalled, covered = y.new_zeros(len(y), dtype=torch.bool), y.new_zeros(len(y), dtype=torch.bool)
    for start, block in _blocks(x, len(y)):
        distances = torch.cdist(block, y)  # (n, M)
        inside = distances <= real_wide
        precision.append((distances <= real).any(1))
        density.append(inside.sum(1) / NEAREST_DENSITY)
        covered |= inside.any(0)
        recalled |= (distances <= generated[start : start + len(block), None]).any(0)
    scores = {"precision": torch.cat(precision), "recall": recalled, "density": torch.cat(density), "coverage": covered}
    return {name: mean(values, draws, seed) for name, values in scores.items()}


def _radii(features: Tensor) -> tuple[Tensor, Tensor]:
    """Distances of each of N images to its third and its fifth neighbour: `(N,)` twice."""
    places = (NEAREST, NEAREST_DENSITY)  # index 0 is the image itself
    found = [
        torch.cdist(block, features).topk(NEAREST_DENSITY + 1, largest=False).values[:, places]
        for _, block in _blocks(features, len(features))
    ]
    return torch.cat(found).unbind(1)


def nearest(features: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """For each row of `(N, D)`, distance and index of the nearest row of `(M, D)`: `(N,)` twice."""
    y = reference.double()
    found = [torch.cdist(block, y).min(1) for _, block in _blocks(features.double(), len(y))]
    return torch.cat([part.values for part in found]), torch.cat([part.indices for part in found])


def mean(scores: Tensor, draws: int = 200, seed: int = 0) -> Estimate:
    """Mean of a score per image, `(N,)`, of any dtype; its interval stays in the range of the scores.

    A mean is unbiased, so the replicates' percentiles need no shift.
    """
    scores = scores.double()
    found = [float(weights @ scores) / len(scores) for weights in _resampled(len(scores), draws, seed, scores.device)]
    return _percentiles(float(scores.mean()), found)


def _resampled(count: int, draws: int, seed: int, device: torch.device) -> list[Tensor]:
    """Bootstrap counts of each of `count` images for each replicate: `(count,)`, float64; functions of (seed, draw)."""
    generators = (randomness.generator(seed, "bootstrap", draw) for draw in range(draws))
    drawn = (torch.randint(count, (count,), generator=generator) for generator in generators)
    return [torch.bincount(chosen, minlength=count).double().to(device) for chosen in drawn]


def _percentiles(value: float, replicates: list[float]) -> Estimate:
    """The value, and the central `LEVEL` interval of the replicates."""
    if not replicates:
        return Estimate(value)
    ends = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    low, high = torch.quantile(torch.tensor(replicates, dtype=torch.float64), ends).tolist()
    return Estimate(value, min(low, value), max(high, value))


def _centred(value: float, replicates: list[float]) -> Estimate:
    """The value, and the percentiles of the replicates, shifted so that their mean is the value.

    A resampled set has fewer distinct images, so replicates of a biased metric have twice its bias.
    """
    shift = value - sum(replicates) / len(replicates) if replicates else 0.0
    return _percentiles(value, [replicate + shift for replicate in replicates])


def _blocks(features: Tensor, others: int) -> list[tuple[int, Tensor]]:
    """Blocks of `(N, D)`, each with its first row's index; distances to `others` have about `BLOCK` entries."""
    size = max(1, BLOCK // max(1, others))
    return [(start, features[start : start + size]) for start in range(0, len(features), size)]

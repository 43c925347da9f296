"""How far two sets of images are apart, on features `(N, D)` of them: Fréchet distance, KID, precision, recall ...

All sums are float64. Intervals are of the bootstrap (Efron & Tibshirani 1993, chapter 13) over the generated images,
for recall and coverage over the real ones. They lie in the range of their figure; they say how much a value owes to
chance, not how far it is biased.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ldm_lab.utils import randomness
from ldm_lab.utils.errors import UserError

LEVEL = 0.95  # of intervals
NEAREST = 3  # neighbours for precision and recall, as Kynkäänniemi et al. 2019 choose
NEAREST_DENSITY = 5  # ... and for density and coverage, as Naeem et al. 2020 do
BLOCK = 2**24  # distances that are held at a time


class Estimate(NamedTuple):
    """A value, and the ends of its interval where there is one."""

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

    The trace of the root is that of (S Σ₂ S)^½ with S = Σ₁^½, which is symmetric: its eigenvalues are real.
    """
    root = _root(one.covariance)
    return _frechet(other, one, (root @ other.covariance @ root))


def _frechet(one: Gaussian, other: Gaussian, product: Tensor) -> float:
    roots = _nonnegative(torch.linalg.eigvalsh(product)).sqrt()
    traces = one.covariance.trace() + other.covariance.trace() - 2 * roots.sum()
    return max(0.0, float((one.mean - other.mean).square().sum() + traces))  # not what rounding leaves below


def _root(covariance: Tensor) -> Tensor:
    """The symmetric root of a symmetric, positive semidefinite matrix."""
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * _nonnegative(values).sqrt()) @ vectors.T


def _nonnegative(values: Tensor) -> Tensor:
    """Eigenvalues without what rounding makes of those that are zero: its root would not be small."""
    noise = values.abs().max() * len(values) * torch.finfo(values.dtype).eps
    return torch.where(values > noise, values, 0)


def frechet(features: Tensor, reference: Gaussian, draws: int = 200, seed: int = 0) -> Estimate:
    """The Fréchet distance of features `(N, D)` to a reference.

    Its bias falls as 1/N: values of different N do not compare (Bińkowski et al. 2018, section 4).

    Args:
        features: of the images.
        reference: of what they are compared with.
        draws: replicates of the bootstrap; 0 for no interval.
        seed: of these.
    """
    features = features.double()
    value, root = frechet_distance(gaussian(features), reference), _root(reference.covariance)
    found = []
    for weights in _resampled(len(features), draws, seed, features.device):
        replicate = _weighted(features, weights)
        found.append(_frechet(replicate, reference, root @ replicate.covariance @ root))
    estimate = _centred(value, found)
    return estimate if estimate.low is None else estimate._replace(low=max(0.0, estimate.low))  # as every distance


def _weighted(features: Tensor, weights: Tensor) -> Gaussian:
    """Mean and covariance where image i is there `weights[i]` times."""
    count = weights.sum()
    mean = weights @ features / count
    around = features - mean
    return Gaussian(mean, (around * weights[:, None]).T @ around / (count - 1))  # (D, N) @ (N, D)


def kid(features: Tensor, reference: Tensor, draws: int = 200, seed: int = 0) -> Estimate:
    """Kernel distance: the unbiased estimate of MMD² with k(x, y) = (x·y / D + 1)³, over all pairs.

    Bińkowski et al. 2018, Eq. 4. Unbiased for any N, and so it may be a little below zero. Replicates leave out pairs
    of an image with its own copies, which would count it as its neighbour.

    Args:
        features: `(N, D)`, of the images.
        reference: `(M, D)`, of what they are compared with.
        draws: replicates of the bootstrap; 0 for no interval.
        seed: of these.
    """
    x, y = features.double(), reference.double()
    rows = [x.new_ones(len(x)), *_resampled(len(x), draws, seed, x.device)]
    weights = torch.stack(rows, dim=1)  # (N, 1 + draws)
    within, across = x.new_zeros(len(rows)), x.new_zeros(len(rows))
    for start, block in _blocks(x, len(x)):
        mine = weights[start : start + len(block)]
        kernel = _kernel(block, x)
        own = kernel.diagonal(start)  # k(xᵢ, xᵢ)
        within += (mine * (kernel @ weights)).sum(0) - (mine.square() * own[:, None]).sum(0)
        across += mine.T @ _mean_kernel(block, y)
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

    Around each image of a set lies a ball that reaches to its k-th neighbour in the set. Precision: the share of
    generated images in a ball of a real one; recall: of real ones in a ball of a generated one; density: in how many
    balls of real ones a generated image lies, over k; coverage: the share of real ones with a generated one in it.

    Args:
        features: `(N, D)`, of generated images; more than `NEAREST_DENSITY`.
        reference: `(M, D)`, of real ones; the same.
        draws: replicates of the bootstrap; 0 for no intervals.
        seed: of these.

    Raises:
        UserError: too few images.
    """
    fewest = min(len(features), len(reference))
    if fewest <= NEAREST_DENSITY:
        raise UserError(f"{fewest} images have not {NEAREST_DENSITY} neighbours: give more")
    x, y = features.double(), reference.double()
    own, (real, real_wide) = _radii(x)[0], _radii(y)
    precision, density = [], []
    recalled, covered = y.new_zeros(len(y), dtype=torch.bool), y.new_zeros(len(y), dtype=torch.bool)
    for start, block in _blocks(x, len(y)):
        distances = torch.cdist(block, y)  # (n, M)
        inside = distances <= real_wide
        precision.append((distances <= real).any(1))
        density.append(inside.sum(1) / NEAREST_DENSITY)
        covered |= inside.any(0)
        recalled |= (distances <= own[start : start + len(block), None]).any(0)
    scores = {"precision": torch.cat(precision), "recall": recalled, "density": torch.cat(density), "coverage": covered}
    return {name: mean(values, draws, seed) for name, values in scores.items()}


def _radii(features: Tensor) -> tuple[Tensor, Tensor]:
    """From each of N images to its third and its fifth neighbour: `(N,)` twice."""
    places = (NEAREST, NEAREST_DENSITY)  # place 0 is the image itself
    found = [
        torch.cdist(block, features).topk(NEAREST_DENSITY + 1, largest=False).values[:, places]
        for _, block in _blocks(features, len(features))
    ]
    return torch.cat(found).unbind(1)


def nearest(features: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Of each of `(N, D)`, the distance to its nearest one of `(M, D)`, and which that is: `(N,)` twice."""
    y = reference.double()
    found = [torch.cdist(block, y).min(1) for _, block in _blocks(features.double(), len(y))]
    return torch.cat([part.values for part in found]), torch.cat([part.indices for part in found])


def mean(scores: Tensor, draws: int = 200, seed: int = 0) -> Estimate:
    """The mean of a score per image, `(N,)`, of any type; its interval stays among the scores, of shares in [0, 1].

    A mean has no bias that replicates had twice: their percentiles stay where they are.
    """
    scores = scores.double()
    found = [float(weights @ scores) / len(scores) for weights in _resampled(len(scores), draws, seed, scores.device)]
    return _percentiles(float(scores.mean()), found)


def _resampled(count: int, draws: int, seed: int, device: torch.device) -> list[Tensor]:
    """How often each of `count` images is drawn, for each replicate: `(count,)`, float64; functions of (seed, draw)."""
    generators = (randomness.generator(seed, "bootstrap", draw) for draw in range(draws))
    drawn = (torch.randint(count, (count,), generator=generator) for generator in generators)
    return [torch.bincount(chosen, minlength=count).double().to(device) for chosen in drawn]


def _percentiles(value: float, replicates: list[float]) -> Estimate:
    """The value, and the middle `LEVEL` of the replicates."""
    if not replicates:
        return Estimate(value)
    ends = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    low, high = torch.quantile(torch.tensor(replicates, dtype=torch.float64), ends).tolist()
    return Estimate(value, min(low, value), max(high, value))


def _centred(value: float, replicates: list[float]) -> Estimate:
    """The percentiles of the replicates, moved so that their mean is the value.

    A resampled set holds fewer different images: replicates of what depends on N have its bias twice.
    """
    shift = value - sum(replicates) / len(replicates) if replicates else 0.0
    return _percentiles(value, [replicate + shift for replicate in replicates])


def _blocks(features: Tensor, others: int) -> list[tuple[int, Tensor]]:
    """Parts of `(N, D)` of which a matrix of distances to `others` has about `BLOCK` entries, with their first row."""
    size = max(1, BLOCK // max(1, others))
    return [(start, features[start : start + size]) for start in range(0, len(features), size)]

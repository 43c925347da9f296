"""Draws training timesteps as functions of (seed, position), independent of earlier draws.

A position is an image's place in the global stream of training images, so any split of a batch over
devices and micro-batches, and a resumed run, draw the same timesteps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Protocol

import torch
from torch import Tensor

from ldm_lab.utils.limits import Positive
from ldm_lab.utils.randomness import generator, uniform

SMALLEST = 2.0**-53  # quantiles are above 0, where the normal distribution has none


class DrawTimesteps(Protocol):
    """Protocol of all draws of timesteps."""

    def __call__(
        self, seed: int, positions: Tensor | Sequence[int], batch_size: int, num_train_timesteps: int
    ) -> Tensor:
        """Timesteps `(B,)` for the images at `positions`: int64 in 0..T-1, or float64 in 0..T.

        `Process.training_timesteps` makes them what the scheduler takes.

        Args:
            seed: the seed of the run.
            positions: places in the global stream of training images, `(B,)`.
            batch_size: size of the *global* batch: batch n holds the positions n * batch_size and following.
            num_train_timesteps: T.
        """


class UniformTimesteps:
    """Independent uniform timesteps (Ho et al. 2020, algorithm 1)."""

    def __call__(
        self, seed: int, positions: Tensor | Sequence[int], batch_size: int, num_train_timesteps: int
    ) -> Tensor:
        """See `DrawTimesteps`."""
        return discretize(uniform(seed, "timestep", _as_list(positions)), num_train_timesteps)


class LowDiscrepancyTimesteps:
    """One offset per global batch, then equal strides: a batch of k hits each k-th part of the range once.

    u_i = (u_0 + i / k) mod 1 (Kingma et al. 2021, "Variational Diffusion Models", arXiv 2107.00630,
    appendix I.1). Each single timestep is uniform; their average, and so the loss, has less variance.

    A permutation, drawn for each batch, maps place p of the batch to i, as devices and micro-batches take neighbouring
    places: without a permutation each would see only a part of the range.

    >>> LowDiscrepancyTimesteps()(0, range(4), 4, 1000).sort().values.diff()
    tensor([250, 250, 250])
    """

    def __call__(
        self, seed: int, positions: Tensor | Sequence[int], batch_size: int, num_train_timesteps: int
    ) -> Tensor:
        """See `DrawTimesteps`."""
        return discretize(_low_discrepancy(seed, positions, batch_size), num_train_timesteps)


class LogitNormalTimesteps:
    """t = sigmoid(n) with n from N(mean, std²), times T: fewer times near data and near noise.

    Esser et al. 2024, arXiv 2403.03206, section 3.1. Flow matching trains at these times, shifted by the scheduler's
    `shift`; a diffusion at the whole timesteps below. Their quantiles are those of `LowDiscrepancyTimesteps`: each time
    alone has this distribution, and a batch covers it evenly.

    Args:
        mean: of the normal distribution; above 0 more times are noisy.
        std: its standard deviation.
    """

    def __init__(self, mean: float = 0.0, std: Positive = 1.0) -> None:
        self.normal = NormalDist(mean, std)

    def __call__(
        self, seed: int, positions: Tensor | Sequence[int], batch_size: int, num_train_timesteps: int
    ) -> Tensor:
        """See `DrawTimesteps`; float64."""
        quantiles = _low_discrepancy(seed, positions, batch_size).tolist()
        # Numbers one by one: functions of torch round the last bit by a number's place in the tensor.
        normals = [self.normal.inv_cdf(max(quantile, SMALLEST)) for quantile in quantiles]
        times = [0.5 + 0.5 * math.tanh(0.5 * normal) for normal in normals]  # sigmoid
        return torch.tensor(times, dtype=torch.float64, device="cpu") * num_train_timesteps


def _low_discrepancy(seed: int, positions: Tensor | Sequence[int], batch_size: int) -> Tensor:
    """Fractions u in [0, 1) of the range of time, `(B,)`, float64: see `LowDiscrepancyTimesteps`."""
    positions = torch.tensor(_as_list(positions), dtype=torch.int64)
    batches, of_position = (positions // batch_size).unique(return_inverse=True)
    offset = uniform(seed, "timestep of batch", batches.tolist())[of_position]
    draws = [generator(seed, "order of timesteps", batch) for batch in batches.tolist()]
    orders = torch.stack([torch.randperm(batch_size, generator=draw) for draw in draws])  # (batches, k)
    strata = orders[of_position, positions % batch_size]
    return (offset + strata / batch_size) % 1


def stratified(count: int) -> Tensor:
    """Midpoints of `count` equal parts of [0, 1), `(count,)`, float64.

    >>> stratified(4)
    tensor([0.1250, 0.3750, 0.6250, 0.8750], dtype=torch.float64)
    """
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


def discretize(fractions: Tensor, num_train_timesteps: int) -> Tensor:
    """Fractions u of the range of time, in [0, 1) -> timesteps floor(u T), int64."""
    return (fractions * num_train_timesteps).long().clamp_(max=num_train_timesteps - 1)


def _as_list(positions: Tensor | Sequence[int]) -> list[int]:
    return positions.tolist() if isinstance(positions, Tensor) else list(positions)

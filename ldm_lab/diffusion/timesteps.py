"""Draws training timesteps as functions of (seed, position), independent of earlier draws.

A position is an image's place in the global stream of training images, so any split of a batch over
devices and micro-batches, and a resumed run, draw the same timesteps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ldm_lab.utils.randomness import generator, uniform


class DrawTimesteps(Protocol):
    """Protocol of all draws of timesteps."""

    def __call__(
        self, seed: int, positions: Tensor | Sequence[int], batch_size: int, num_train_timesteps: int
    ) -> Tensor:
        """Timesteps `(B,)`, int64 in 0..T-1, for the images at `positions`.

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
        positions = torch.tensor(_as_list(positions), dtype=torch.int64)
        batches, of_position = (positions // batch_size).unique(return_inverse=True)
        offset = uniform(seed, "timestep of batch", batches.tolist())[of_position]
        draws = [generator(seed, "order of timesteps", batch) for batch in batches.tolist()]
        orders = torch.stack([torch.randperm(batch_size, generator=draw) for draw in draws])  # (batches, k)
        strata = orders[of_position, positions % batch_size]
        return discretize((offset + strata / batch_size) % 1, num_train_timesteps)


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

"""Sampler of the endless stream of training images; its order is a function of (seed, position)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Sampler

from ldm_lab.utils.errors import UserError
from ldm_lab.utils.randomness import generator


@dataclass(eq=False)
class StreamBatchSampler(Sampler[list[tuple[int, int]]]):
    """Batches for one device from the endless global stream of training images.

    Position n of the stream is in epoch `n // N` and shows image `order(epoch)[n % N]` of the N images.
    Global batch g covers the positions `[g * G, (g + 1) * G)`. It is split into micro-batches of b
    images on each of W devices: micro-batch k of rank r begins at `g * G + (k * W + r) * b`. So the
    images of a global batch do not depend on b and W, and a run resumes from a position alone.

    Yields lists of b pairs (index, position).

    Args:
        dataset_size: N, images in the data set; may be less than G.
        global_batch_size: G, images per optimizer step.
        batch_size: b, images that one device holds at a time.
        seed: seed of the order.
        rank: r, rank of this device.
        world_size: W, number of devices.
        start: positions already seen, a multiple of G.
        stop: position at which training ends; None: never.
        groups: `(N,)`, the archive of each image, to read archive after archive (see `shard_order`); None: any order.
        window: archives that are mixed at a time.

    Raises:
        UserError: G is not a multiple of b * W, `start` is not a multiple of G, or the data set is empty.
    """

    dataset_size: int
    global_batch_size: int
    batch_size: int
    seed: int
    rank: int = 0
    world_size: int = 1
    start: int = 0
    stop: int | None = None
    groups: Tensor | None = None
    window: int = 1

    def __post_init__(self) -> None:
        if self.dataset_size < 1:
            raise UserError("the training set is empty: there is nothing to draw batches from")
        if not 0 <= self.rank < self.world_size:
            raise UserError(
                f"rank {self.rank} of {self.world_size} devices: give a rank from 0 to {self.world_size - 1}"
            )
        accumulation(self.global_batch_size, self.batch_size, self.world_size)  # raises if not divisible
        if self.start < 0 or self.start % self.global_batch_size:
            raise UserError(
                f"{self.start} images seen is not a whole number of global batches of {self.global_batch_size}: "
                "continue with the data.global_batch_size that the run was started with"
            )
        self._epoch, self._order = -1, torch.empty(0)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        first = self.start + self.rank * self.batch_size
        # Consecutive micro-batches are b * W apart, across global batches too, as b * W divides G.
        while self.stop is None or first < self.stop:
            yield [(self.index(position), position) for position in range(first, first + self.batch_size)]
            first += self.batch_size * self.world_size

    def order(self, epoch: int) -> Tensor:
        """The image indices of one epoch: `(N,)`, int64."""
        if self.groups is None:
            return permutation(self.dataset_size, self.seed, epoch)
        return shard_order(self.groups, self.window, self.seed, epoch)

    def index(self, position: int) -> int:
        """The image index at a position of the stream."""
        epoch, place = divmod(position, self.dataset_size)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self.order(epoch)
        return int(self._order[place])


def shard_order(groups: Tensor, window: int, seed: int, epoch: int) -> Tensor:
    """The order of one epoch that needs only a few archives at a time: `(N,)`, int64.

    Archives are shuffled; an image of archive k of that order gets the key k + window * u, u drawn from [0, 1), and
    the keys are sorted. So at any moment images come from at most `window` + 1 archives, and the next archive begins as
    the first one ends.

    Args:
        groups: `(N,)`, the archive of each image.
        window: archives that are mixed.
        seed: seed of the order.
        epoch: number of the epoch.
    """
    drawing = generator(seed, "shards", epoch)
    names, numbers = groups.unique(return_inverse=True)
    turns = torch.randperm(len(names), generator=drawing)[numbers]
    return (turns + window * torch.rand(len(groups), generator=drawing, dtype=torch.float64)).argsort(stable=True)


def permutation(size: int, seed: int, epoch: int) -> Tensor:
    """The order of `size` images in one epoch: `(size,)`, int64."""
    return torch.randperm(size, generator=generator(seed, "order", epoch))


def accumulation(global_batch_size: int, batch_size: int, world_size: int) -> int:
    """Micro-batches per device and optimizer step: G / (b * W).

    Raises:
        UserError: G is not a multiple of b * W; the message names the nearest valid values.
    """
    if min(global_batch_size, batch_size) < 1:
        raise UserError(
            f"data.global_batch_size={global_batch_size}, data.batch_size={batch_size}: both must be 1 or more"
        )
    at_a_time = batch_size * world_size
    if global_batch_size % at_a_time == 0:
        return global_batch_size // at_a_time
    below = global_batch_size // at_a_time * at_a_time
    advice = f"data.global_batch_size={f'{below} or ' if below else ''}{below + at_a_time}"
    if global_batch_size % world_size == 0:
        share = global_batch_size // world_size
        advice += f", or data.batch_size={min(divisors(share), key=lambda size: abs(size - batch_size))}"
    raise UserError(
        f"data.global_batch_size={global_batch_size} is not divisible by data.batch_size={batch_size} "
        f"on {world_size} device(s), {at_a_time} images at a time: use {advice}"
    )


def divisors(number: int) -> list[int]:
    """All divisors of a positive number, ascending."""
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]

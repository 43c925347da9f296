"""Statistics over many batches in float64, also for devices without float64, and lists over all ranks."""

from __future__ import annotations

from typing import Any

import torch
from lightning import Trainer
from torch import Tensor


def moments(values: Tensor) -> Tensor:
    """Number, mean and variance of a tensor's entries, `(3,)`, float32, on its device."""
    variance, mean = torch.var_mean(values.float(), correction=0)
    return torch.stack([mean.new_full((), values.numel()), mean, variance])


def pooled(moments: Tensor) -> tuple[float, float]:
    """Moments `(n, 3)` of n tensors -> mean and standard deviation of all entries (Chan et al. 1979)."""
    number, mean, variance = moments.unbind(1)
    total = number.sum()
    centre = (number * mean).sum() / total
    squares = (number * (variance + (mean - centre).square())).sum() / total
    return float(centre), float(squares.sqrt())


def of_all_ranks(trainer: Trainer, rows: list[Tensor]) -> Tensor:
    """One tensor `(...)` per batch, equally many per rank -> those of all ranks `(n, ...)`, float64, on the CPU."""
    stacked = torch.stack(rows)
    gathered = trainer.strategy.all_gather(stacked)  # (n, ...); with several ranks (R, n, ...)
    return gathered.reshape(-1, *stacked.shape[1:]).cpu().double()


def gathered(trainer: Trainer, items: list[Any]) -> list[Any]:
    """Concatenate the lists of all ranks; every rank gets the result."""
    if trainer.world_size == 1:
        return items
    lists: list[list[Any]] = [[] for _ in range(trainer.world_size)]
    torch.distributed.all_gather_object(lists, items)
    return [item for of_rank in lists for item in of_rank]

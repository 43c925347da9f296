"""Means over many batches, as exact as float64 makes them, on devices that may have none."""

from __future__ import annotations

import torch
from lightning import Trainer
from torch import Tensor


def moments(values: Tensor) -> Tensor:
    """Of any tensor, on its device: number, mean and variance of its entries, `(3,)`, float32."""
    variance, mean = torch.var_mean(values.float(), correction=0)
    return torch.stack([mean.new_full((), values.numel()), mean, variance])


def pooled(moments: Tensor) -> tuple[float, float]:
    """Moments `(n, 3)` of n tensors -> mean and standard deviation of all their entries (Chan et al. 1979)."""
    number, mean, variance = moments.unbind(1)
    total = number.sum()
    centre = (number * mean).sum() / total
    squares = (number * (variance + (mean - centre).square())).sum() / total
    return float(centre), float(squares.sqrt())


def of_all_ranks(trainer: Trainer, rows: list[Tensor]) -> Tensor:
    """Tensors `(...)`, one a batch, as many on each rank -> those of all ranks `(n, ...)`, float64, on the host."""
    own = torch.stack(rows)
    gathered = trainer.strategy.all_gather(own)  # (n, ...), of several ranks (R, n, ...)
    return gathered.reshape(-1, *own.shape[1:]).cpu().double()

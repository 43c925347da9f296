"""Applies one number per sample to a batch: broadcasting, and dynamic thresholding."""

from __future__ import annotations

import torch
from torch import Tensor

from ldm_lab.utils.errors import UserError


def per_sample(values: Tensor, batch: Tensor) -> Tensor:
    """Reshape one number per sample, or one for all, to broadcast against `batch`.

    >>> import torch
    >>> per_sample(torch.ones(4), torch.zeros(4, 3, 8, 8)).shape
    torch.Size([4, 1, 1, 1])

    Args:
        values: `(B,)`, `(1,)` or `()`.
        batch: `(B, ...)`.

    Returns:
        `values` as `(B, 1, ..., 1)` or `(1, 1, ..., 1)`, with as many dimensions as `batch`.

    Raises:
        UserError: the number of values is neither 1 nor B.
    """
    if values.ndim > 1 or values.numel() not in (1, len(batch)):
        raise UserError(f"shape {tuple(values.shape)} is not one value per sample of a batch of {len(batch)}")
    return values.reshape(-1, *[1] * (batch.ndim - 1))  # (B,) -> (B, 1, ..., 1)


def dynamic_threshold(x0: Tensor, ratio: float, maximum: float) -> Tensor:
    """Clip each sample at its own quantile of |x0| and rescale it to [-1, 1] (Saharia et al. 2022, section 2.3).

    For images; latents have no fixed range.

    Args:
        x0: `(B, ...)`, float32 or float64.
        ratio: the quantile, in 0..1.
        maximum: upper bound of the limit; 1: plain clipping to [-1, 1].
    """
    limit = torch.quantile(x0.abs().flatten(1), ratio, dim=1).clamp(1, maximum)  # (B, ...) -> (B,)
    limit = per_sample(limit, x0)
    return x0.clamp(-limit, limit) / limit

"""Broadcasts one number per sample against a batch."""

from __future__ import annotations

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

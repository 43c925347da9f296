"""Dynamic thresholding of predicted images; not for latents, which have no fixed range."""

from __future__ import annotations

import torch
from torch import Tensor

from ldm_lab.diffusion.broadcast import per_sample


def dynamic_threshold(x0: Tensor, ratio: float, maximum: float) -> Tensor:
    """Clip each sample at its own quantile of |x0| and rescale it to [-1, 1] (Saharia et al. 2022, section 2.3).

    Args:
        x0: `(B, ...)`, float32 or float64.
        ratio: the quantile, in 0..1.
        maximum: upper bound of the limit; 1: plain clipping to [-1, 1].
    """
    limit = torch.quantile(x0.abs().flatten(1), ratio, dim=1).clamp(1, maximum)  # (B, ...) -> (B,)
    limit = per_sample(limit, x0)
    return x0.clamp(-limit, limit) / limit

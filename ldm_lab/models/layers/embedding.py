"""Timestep embedding: sines and cosines of many frequencies, then a small MLP."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def sinusoid(timesteps: Tensor, dim: int, flip_sin_to_cos: bool = True, freq_shift: float = 0) -> Tensor:
    """Sinusoidal embedding of timesteps, computed in float32.

    Ho et al. 2020 (arXiv 2006.11239), after Vaswani et al. 2017 (arXiv 1706.03762), section 3.5: entry i
    has the frequency 10000^(-i / (dim/2 - freq_shift)).

    Args:
        timesteps: `(B,)`, in steps of the training schedule; may be fractional.
        dim: length of the embedding; an odd length ends in a zero.
        flip_sin_to_cos: cosines first, as in CompVis; otherwise sines first.
        freq_shift: with 1 the last frequency is exactly 1/10000, with 0 slightly above.

    Returns:
        `(B, dim)`, float32.
    """
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=timesteps.device) / (half - freq_shift)
    angles = timesteps.float()[:, None] * torch.exp(-math.log(10_000) * exponents)  # (B,) -> (B, dim/2)
    waves = (angles.cos(), angles.sin()) if flip_sin_to_cos else (angles.sin(), angles.cos())
    return F.pad(torch.cat(waves, dim=1), (0, dim % 2))  # (B, dim)


class FourierFeatures(nn.Module):
    """Sines and cosines of fixed random frequencies (Song et al. 2021, arXiv 2011.13456, app. C.1).

    Args:
        features: number of frequencies.
    """

    SCALE = 16.0  # standard deviation of the frequencies

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(features) * self.SCALE, requires_grad=False)

    def forward(self, noise: Tensor) -> Tensor:
        """Noise levels or timesteps above 0, `(B,)` -> sines and cosines of their logarithm, `(B, 2 features)`."""
        angles = 2 * math.pi * noise.float().log()[:, None] * self.weight  # (B,) -> (B, features)
        return torch.cat([angles.sin(), angles.cos()], dim=1)


class TimestepEmbedding(nn.Module):
    """Linear, SiLU, Linear: `(B, in_features) -> (B, features)`."""

    def __init__(self, in_features: int, features: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_features, features)
        self.act = nn.SiLU()
        self.linear_2 = nn.Linear(features, features)

    def forward(self, x: Tensor) -> Tensor:
        """Map the sinusoid to the embedding that every residual block receives."""
        return self.linear_2(self.act(self.linear_1(x)))

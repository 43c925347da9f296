"""Noise levels, also between the training timesteps, and their spacings.

The level of a timestep is r = σ / α, the ratio of noise to signal, which Karras et al. 2022 call σ.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Level(NamedTuple):
    """A noise level: x_t = α x0 + σ ε, and λ = log(α / σ), half the logarithm of the SNR."""

    alpha: float
    sigma: float
    log_snr: float

    @classmethod
    def of(cls, alpha_bar: float) -> Level:
        """The level of ᾱ in [0, 1]; λ is -∞ at pure noise and ∞ at a clean sample."""
        return cls._of(math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar))

    @classmethod
    def of_ratio(cls, ratio: float) -> Level:
        """The level at which σ / α is `ratio` and α² + σ² = 1."""
        alpha = 1 / math.hypot(1, ratio)
        return cls._of(alpha, ratio * alpha)

    @classmethod
    def of_flow(cls, sigma: float) -> Level:
        """The level σ in [0, 1] of a straight path from data to noise, where α = 1 - σ."""
        return cls._of(1 - sigma, sigma)

    @classmethod
    def _of(cls, alpha: float, sigma: float) -> Level:
        if not alpha or not sigma:
            return cls(alpha, sigma, math.inf if alpha else -math.inf)
        return cls(alpha, sigma, math.log(alpha / sigma))


def karras(first: float, last: float, count: int) -> Tensor:
    """Even spacing of r^(1/7), `first` to `last`: `(count,)`, float64 (Karras et al. 2022, arXiv 2206.00364, eq. 5)."""
    return _evenly(first ** (1 / 7), last ** (1 / 7), count) ** 7


def exponential(first: float, last: float, count: int) -> Tensor:
    """Even spacing of log r: `(count,)`, float64."""
    return _evenly(math.log(first), math.log(last), count).exp()


def beta(first: float, last: float, count: int) -> Tensor:
    """r at even quantiles of the beta distribution with α = β = 0.6 (Lee et al. 2024, arXiv 2407.12173, section 4)."""
    return last + (first - last) * beta_quantile(_evenly(1.0, 0.0, count), 0.6)


# Solver setting -> spacing.
SPREADS: dict[str, Callable[[float, float, int], Tensor]] = {
    "use_karras_sigmas": karras,
    "use_exponential_sigmas": exponential,
    "use_beta_sigmas": beta,
}


def flow(total: int, shift: float, count: int) -> Tensor:
    """σ of a straight path: even in 1 - 1/T ... 0 without the end, then shifted towards noise (Esser et al. 2024).

    Args:
        total: T.
        shift: s in σ -> s σ / (1 + (s - 1) σ) (arXiv 2403.03206, eq. 23); 1: no shift.
        count: number of levels.
    """
    sigma = _evenly(1 - 1 / total, 0.0, count + 1)[:-1]
    return shift * sigma / (1 + (shift - 1) * sigma)


def timesteps_at(ratios: Tensor, table: Tensor) -> Tensor:
    """Fractional timesteps of levels, by linear interpolation in log r.

    Args:
        ratios: r of the levels, `(N,)`.
        table: r of each of the T timesteps, `(T,)`, ascending.
    """
    levels, known = ratios.log(), table.log()
    after = torch.searchsorted(known, levels).clamp(1, len(known) - 1)
    low, high = known[after - 1], known[after]
    return after - 1 + ((levels - low) / (high - low)).clamp(0, 1)


def beta_quantile(probabilities: Tensor, shape: float) -> Tensor:
    """Quantiles of the symmetric beta distribution with both parameters `shape`: `(N,)` in [0, 1], float64.

    Up to 1/2 its distribution function is, up to a factor, x^a Σ_n c_n x^n with c_n = (1-a)(2-a)...(n-a) / (n! (a+n))
    (DLMF 8.17.7), which bisection inverts; above 1/2 it is the mirror image.
    """
    index = torch.arange(1, 64, dtype=torch.float64)
    rising = torch.cat([torch.ones(1, dtype=torch.float64), ((index - shape) / index).cumprod(0)])
    terms = (rising / (shape + torch.arange(64, dtype=torch.float64))).tolist()

    def mass(x: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        for term in reversed(terms):
            total = total * x + term
        return x**shape * total

    lower = torch.minimum(probabilities, 1 - probabilities)
    wanted = 2 * lower * mass(torch.tensor(0.5, dtype=torch.float64))
    below, above = torch.zeros_like(wanted), torch.full_like(wanted, 0.5)
    for _ in range(60):
        middle = (below + above) / 2
        less = mass(middle) < wanted
        below, above = torch.where(less, middle, below), torch.where(less, above, middle)
    return torch.where(probabilities > 0.5, 1 - below, below)


def _evenly(first: float, last: float, count: int) -> Tensor:
    return torch.linspace(first, last, count, dtype=torch.float64, device="cpu")

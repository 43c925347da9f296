"""Power-function profiles of weight averages, and their least-squares combination.

Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", arXiv 2312.02696, sections 3.1
and 3.2, appendix C. A profile says how much the weights of each past moment tau count in an average at time t:

    p(tau; t) = (gamma + 1) tau^gamma / t^(gamma + 1),   0 <= tau <= t

Its length sigma_rel is its standard deviation relative to t. Times are training images.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ldm_lab.utils.errors import UserError

Numbers = float | np.ndarray

LONGEST = 12**-0.5  # sigma_rel of the plain mean, gamma = 0; its profile is the widest that does not fall with time


class Profile(NamedTuple):
    """One profile.

    Attributes:
        length: sigma_rel.
        time: t, in training images.
    """

    length: float
    time: float


class Fit(NamedTuple):
    """A profile as a combination of others.

    Attributes:
        weights: coefficient of each other profile; their sum is 1.
        residual: L2 norm of the error, relative to that of the wanted profile.
    """

    weights: list[float]
    residual: float


def check(length: float, key: str) -> None:
    """Raise `UserError`, which begins with `key`, unless a length is one of a profile."""
    if not 0 < length < LONGEST:
        raise UserError(f"{key}: a length must be above 0 and below {LONGEST:.3f}, such as 0.05")


@functools.cache
def gamma(length: float) -> float:
    """The exponent of a length: the largest real root of g^3 + 7 g^2 + (16 - s^-2) g + (12 - s^-2) = 0."""
    inverse = length**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())  # the only one above -1, below `LONGEST`


def length(gamma: float) -> float:
    """sigma_rel = (gamma + 1)^(1/2) / ((gamma + 2) (gamma + 3)^(1/2))."""
    return (gamma + 1) ** 0.5 / ((gamma + 2) * (gamma + 3) ** 0.5)


def beta(gamma: float, images_seen: int, batch_size: int) -> float:
    """The decay of an update after `images_seen` images, the last `batch_size` of them in this step.

    With the step t = images_seen / batch_size this is (1 - 1/t)^(gamma + 1). Counted in images, the profile stays the
    same where the batch size changes within a run. The first decay is 0: an average forgets its initial weights.
    """
    return (1 - batch_size / images_seen) ** (gamma + 1)


def inner(gamma_a: Numbers, t_a: Numbers, gamma_b: Numbers, t_b: Numbers) -> Numbers:
    """Inner products of two profiles: the integral of p_a(tau; t_a) p_b(tau; t_b) over tau. Arrays broadcast.

    For t_a <= t_b: (gamma_a + 1) (gamma_b + 1) / (gamma_a + gamma_b + 1) (t_a / t_b)^gamma_b / t_b.
    """
    gamma_of_late = np.where(t_a <= t_b, gamma_b, gamma_a)
    early, late = np.minimum(t_a, t_b), np.maximum(t_a, t_b)
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * (early / late) ** gamma_of_late / late


def fit(stored: Sequence[Profile], wanted: Profile) -> Fit:
    """The combination of `stored` profiles that comes nearest to the `wanted` profile in L2.

    The coefficients sum to 1, as every profile integrates to 1. Without this condition a short list of snapshots gives
    sums of 0.9 and less, which would shrink all weights of the network.
    """
    if wanted in stored:
        return Fit([float(profile == wanted) for profile in stored], 0.0)
    gammas = np.array([gamma(length) for length, _ in stored])
    times = np.array([time for _, time in stored]) / wanted.time
    norms = inner(gammas, times, gammas, times) ** 0.5
    products = inner(gammas[:, None], times[:, None], gammas, times) / np.outer(norms, norms)
    target = gamma(wanted.length)
    towards, size = inner(gammas, times, target, 1.0) / norms, float(inner(target, 1.0, target, 1.0))
    condition = np.append(1 / norms, 0)  # of the sum, with its multiplier as one more unknown
    system = np.vstack([np.column_stack([products, condition[:-1]]), condition])
    found = np.linalg.lstsq(system, np.append(towards, 1), rcond=1e-12)[0][:-1]
    error = float(found @ products @ found - 2 * found @ towards) + size
    return Fit((found / norms).tolist(), (max(0.0, error) / size) ** 0.5)

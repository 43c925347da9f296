"""Multistep updates of DPM-Solver and DPM-Solver++ from the predictions at the last noise levels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from ldm_lab.diffusion.levels import Level
from ldm_lab.utils.errors import UserError


class Update(NamedTuple):
    """x_prev = `keep` x_t + `gain` I(`exponent`) + `noise` z, where I integrates the network's predictions."""

    keep: float
    gain: float
    exponent: float
    noise: float


def by_data(here: Level, target: Level, count: int) -> Update:
    """DPM-Solver++, from predictions of x0 (Lu et al. 2022, arXiv 2211.01095, eq. 9; SDE, count = 2: section 5.3)."""
    h = target.log_snr - here.log_snr
    keep, noise = (1.0, 0.0) if count == 1 else (math.exp(-h), target.sigma * math.sqrt(-math.expm1(-2 * h)))
    return Update(keep * target.sigma / here.sigma, -target.alpha, -count * h, noise)


def by_noise(here: Level, target: Level, count: int) -> Update:
    """DPM-Solver, from predictions of ε (Lu et al. 2022, arXiv 2206.00927, eq. 3.4; SDE, count = 2, likewise)."""
    if not here.alpha:
        raise UserError("algorithm_type: a chain that begins at pure noise (zero terminal SNR) needs 'dpmsolver++'")
    h = target.log_snr - here.log_snr
    noise = 0.0 if count == 1 else target.sigma * math.sqrt(math.expm1(2 * h))
    return Update(target.alpha / here.alpha, -count * target.sigma, h, noise)


# Update function, and the factor of the step in λ: 1 for the ODE, 2 for the SDE.
ALGORITHMS: dict[str, tuple[Callable[[Level, Level, int], Update], int]] = {
    "dpmsolver++": (by_data, 1),
    "sde-dpmsolver++": (by_data, 2),
    "dpmsolver": (by_noise, 1),
    "sde-dpmsolver": (by_noise, 2),
    "deis": (by_data, 1),  # in configs of DEIS, which has its own update
}


def midpoint(z: float) -> float:
    """Weight of the second term in the update of order 2, by the midpoint rule."""
    return 0.5 * math.expm1(z)


def heun(z: float) -> float:
    """The same weight by exact integration of a line: 1 - (e^z - 1) / z, with its sign."""
    return math.expm1(z) / z - 1


SOLVERS: dict[str, Callable[[float], float]] = {
    "midpoint": midpoint,
    "heun": heun,
    **dict.fromkeys(("logrho", "bh1", "bh2"), midpoint),  # in configs of DEIS and UniPC
}


def integral(history: Sequence[tuple[Level, Tensor]], z: float, h: float, weigh: Callable[[float], float]) -> Tensor:
    """∫ e^λ D(λ) dλ over a step, up to a factor; D is the polynomial through the predictions of `history`.

    Args:
        history: up to three levels with their predictions, newest first.
        z: the exponent, proportional to h.
        h: the step in λ.
        weigh: one of `SOLVERS`, used for two predictions.
    """
    (here, newest), *before = history
    first = math.expm1(z)  # e^z - 1
    if not before:
        return first * newest
    (one, second), *rest = before
    r0 = (here.log_snr - one.log_snr) / h
    slope = (newest - second) / r0
    if not rest:
        return first * newest + weigh(z) * slope
    two, third = rest[0]
    r1 = (one.log_snr - two.log_snr) / h
    older = (second - third) / r1
    bend = (slope - older) / (r0 + r1)
    slope = slope + r0 * bend
    return first * newest + (first / z - 1) * slope + ((first - z) / z**2 - 0.5) * bend

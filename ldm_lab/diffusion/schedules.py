"""Beta schedules: the noise that each of the T training timesteps adds.

Every function returns float64 of shape `(T,)` on the CPU, as a product of a thousand factors needs double
precision. The scheduler rounds once, to float32, when it stores the tables.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ldm_lab.utils.arguments import is_integer, is_number, require, require_choice
from ldm_lab.utils.errors import UserError
from ldm_lab.utils.reading import MAX_TIMESTEPS

MAX_COSINE_BETA = 0.999  # Nichol & Dhariwal 2021, below eq. 17: avoids a singularity near t = T


def linear(num_train_timesteps: int, beta_start: float, beta_end: float) -> Tensor:
    """β grows linearly from `beta_start` to `beta_end` (Ho et al. 2020, section 4)."""
    return torch.linspace(beta_start, beta_end, num_train_timesteps, dtype=torch.float64, device="cpu")


def scaled_linear(num_train_timesteps: int, beta_start: float, beta_end: float) -> Tensor:
    """√β grows linearly (Rombach et al. 2022; their configs call this schedule "linear").

    >>> scaled_linear(3, 0.01, 0.09).sqrt()
    tensor([0.1000, 0.2000, 0.3000], dtype=torch.float64)
    """
    return linear(num_train_timesteps, math.sqrt(beta_start), math.sqrt(beta_end)).square()


def squaredcos_cap_v2(num_train_timesteps: int, *_: float) -> Tensor:
    """ᾱ follows a squared cosine, β capped at 0.999 (Nichol & Dhariwal 2021, eq. 17); ignores the range of β."""
    time = torch.linspace(0, 1, num_train_timesteps + 1, dtype=torch.float64, device="cpu")
    alpha_bar = torch.cos((time + 0.008) / 1.008 * math.pi / 2).square()
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=MAX_COSINE_BETA)  # (T+1,) -> (T,)


BETA_SCHEDULES: dict[str, Callable[[int, float, float], Tensor]] = {
    "linear": linear,
    "scaled_linear": scaled_linear,
    "squaredcos_cap_v2": squaredcos_cap_v2,
}


def rescale_zero_terminal_snr(betas: Tensor) -> Tensor:
    """Shift and scale √ᾱ so that ᾱ_T = 0 and ᾱ_1 is unchanged (Lin et al. 2024, arXiv 2305.08891, algorithm 1)."""
    root = torch.cumprod(1 - betas, 0).sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    alpha_bar = root.square()
    alphas = torch.cat([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])
    return 1 - alphas


def make_betas(
    beta_schedule: str,
    num_train_timesteps: int,
    beta_start: float,
    beta_end: float,
    trained_betas: Sequence[float] | None = None,
    rescale_betas_zero_snr: bool = False,
) -> Tensor:
    """The checked betas of a scheduler's settings; `(T,)`, float64.

    Args:
        beta_schedule: a name in `BETA_SCHEDULES`.
        num_train_timesteps: T.
        beta_start: β of the first timestep, in (0, 1); unused by the cosine schedule.
        beta_end: β of the last timestep, in (0, 1).
        trained_betas: betas instead of a schedule; their number is T and overrides `num_train_timesteps`.
        rescale_betas_zero_snr: apply `rescale_zero_terminal_snr` at the end.

    Raises:
        UserError: a name is unknown, or a value is out of range.
    """
    possible = is_integer(num_train_timesteps) and 1 <= num_train_timesteps <= MAX_TIMESTEPS
    require(possible, "num_train_timesteps", num_train_timesteps, f"a whole number in 1..{MAX_TIMESTEPS}")
    require_choice("beta_schedule", beta_schedule, BETA_SCHEDULES)
    for key, value in (("beta_start", beta_start), ("beta_end", beta_end)):
        require(is_number(value) and 0 < value < 1, key, value, "between 0 and 1, both excluded")
    if trained_betas is None:
        betas = BETA_SCHEDULES[beta_schedule](num_train_timesteps, beta_start, beta_end)
    else:
        betas = _checked_betas(trained_betas)
    if not rescale_betas_zero_snr:
        return betas
    require(len(betas) > 1, "num_train_timesteps", len(betas), "at least 2 with rescale_betas_zero_snr")
    return rescale_zero_terminal_snr(betas)


def cumulative_signal(betas: Tensor) -> Tensor:
    """ᾱ, the cumulative product of 1 - β: `(T,) -> (T,)`, float64.

    Raises:
        UserError: in double precision the first timestep has no noise, or a timestep before the last has no
            signal; steps divide by both.
    """
    alpha_bar = torch.cumprod(1 - betas, 0)
    if alpha_bar[0] == 1:
        raise UserError("beta_start or trained_betas[0] is so small that the first timestep has no noise: raise it")
    if (alpha_bar[:-1] == 0).any():
        raise UserError("beta_end or trained_betas are so large that no signal is left before the end: lower them")
    return alpha_bar


def _checked_betas(trained_betas: Sequence[float]) -> Tensor:
    if not isinstance(trained_betas, Sequence) or not all(type(beta) in (int, float) for beta in trained_betas):
        raise UserError("trained_betas must be a list of numbers")
    possible = 1 <= len(trained_betas) <= MAX_TIMESTEPS
    require(possible, "trained_betas", trained_betas, f"a list of 1 to {MAX_TIMESTEPS} numbers")
    betas = torch.tensor(trained_betas, dtype=torch.float64, device="cpu")
    # Only the last timestep may be pure noise (β = 1), as no signal is left after it.
    allowed = (betas > 0) & (betas < 1)
    allowed[-1] |= betas[-1] == 1
    for index in (~allowed).nonzero().flatten().tolist():
        wanted = "between 0 and 1, both excluded (the last may be 1)"
        require(False, f"trained_betas[{index}]", float(betas[index]), wanted)
    return betas

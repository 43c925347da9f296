"""DDPM: Denoising Diffusion Probabilistic Models (Ho et al. 2020, arXiv 2006.11239)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import SupportsIndex

import torch
from torch import Tensor

from ldm_lab.diffusion.noise import step_noise
from ldm_lab.diffusion.process import SchedulerOutput
from ldm_lab.diffusion.scheduler import Scheduler, posterior_variance
from ldm_lab.utils.arguments import require_choice
from ldm_lab.utils.configurable import register_to_config


def forward_variance(alpha_bar_t: float, alpha_bar_prev: float) -> float:
    """Variance of q(x_t | x_prev), β_t in Ho et al. 2020, eq. 2, between any two noise levels."""
    return 1 - alpha_bar_t / alpha_bar_prev


# Ho et al. 2020, section 3.2: the two extreme choices. The "_log" names mean the same values; they are
# accepted so that existing configs load.
VARIANCES: dict[str, Callable[[float, float], float]] = {
    "fixed_small": posterior_variance,
    "fixed_small_log": posterior_variance,
    "fixed_large": forward_variance,
    "fixed_large_log": forward_variance,
}


class DDPMScheduler(Scheduler):
    """DDPM sampler: ancestral sampling through all T timesteps or any descending list of them.

    >>> scheduler = DDPMScheduler(num_train_timesteps=10, clip_sample=False)
    >>> scheduler.set_timesteps(timesteps=[9, 4, 0])
    >>> scheduler.previous_timestep(9)
    4

    Arguments that are not listed here: see `SchedulerSettings`.

    Args:
        variance_type: "fixed_small" (β̃_t) or "fixed_large" (β_t), each also with "_log". Learned variances are
            rejected, as the networks here predict none.
        clip_sample: clip the predicted x0 to `[-clip_sample_range, clip_sample_range]`; not for latents.
        clip_sample_range: see `clip_sample`.

    Raises:
        UserError: a name is unknown, or a value is out of range.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        variance_type: str = "fixed_small",
        clip_sample: bool = True,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
    ) -> None:
        require_choice("variance_type", variance_type, VARIANCES)
        super().__init__()

    def step(
        self,
        model_output: Tensor,
        timestep: SupportsIndex,
        sample: Tensor,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        return_dict: bool = True,
        variance_noise: Tensor | None = None,
        prev_timestep: SupportsIndex | None = None,
    ) -> SchedulerOutput | tuple[Tensor, Tensor]:
        """Draw from q(x_prev | x_t, x0) at the predicted x0 (Ho et al. 2020, eq. 7), in float32 or higher:

            x_prev = (√ᾱ_prev β x0 + √(1 - β) (1 - ᾱ_prev) x_t) / (1 - ᾱ_t) + √variance z,   β = 1 - ᾱ_t/ᾱ_prev

        where prev is `previous_timestep(timestep)`. The last step of the list adds no noise (algorithm 2).

        Args:
            model_output: the network's prediction at `sample`, `(B, ...)`.
            timestep: t, usually one of `timesteps`. A tensor on a GPU makes the host wait.
            sample: x_t, `(B, ...)`.
            generator: draws z; a list has one generator per sample.
            return_dict: `False` returns a plain tuple.
            variance_noise: z itself, instead of a generator.
            prev_timestep: go to this earlier timestep instead; below 0: the end of the chain.

        Raises:
            UserError: t is not within 0..T-1; epsilon prediction with ᾱ_t = 0; shapes or the number of generators
            do not fit.
        """
        t, earlier = self._step_times(timestep, prev_timestep)
        x_t, x0, _ = self._denoise(model_output, t, sample)
        alpha_bar, alpha_bar_prev = self._alpha_bar_at(t), self._alpha_bar_at(earlier)

        beta = forward_variance(alpha_bar, alpha_bar_prev)
        weight_x0 = math.sqrt(alpha_bar_prev) * beta / (1 - alpha_bar)
        weight_x_t = math.sqrt(1 - beta) * (1 - alpha_bar_prev) / (1 - alpha_bar)
        x_prev = weight_x0 * x0 + weight_x_t * x_t
        if earlier >= 0:
            variance = VARIANCES[self.config.variance_type](alpha_bar, alpha_bar_prev)
            x_prev = x_prev + math.sqrt(variance) * step_noise(x_t, generator, variance_noise)
        return self._result(x_prev, x0, sample.dtype, return_dict)

"""DDIM: Denoising Diffusion Implicit Models (Song et al. 2021, arXiv 2010.02502)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import SupportsIndex

import torch
from torch import Tensor

from ldm_lab.diffusion.noise import step_noise
from ldm_lab.diffusion.process import SchedulerOutput
from ldm_lab.diffusion.scheduler import Scheduler, posterior_variance
from ldm_lab.utils.arguments import is_number, require
from ldm_lab.utils.configurable import register_to_config


class DDIMScheduler(Scheduler):
    """DDIM sampler: steps between any two noise levels, deterministic (eta = 0) or ancestral like DDPM (eta = 1).

    For latents set `clip_sample=False`, as latents have no fixed range. CompVis's DDIM is
    `beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1`.

    >>> scheduler = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False)
    >>> scheduler.set_timesteps(4)
    >>> scheduler.timesteps
    tensor([750, 500, 250,   0])

    Arguments that are not listed here: see `SchedulerSettings`.

    Args:
        clip_sample: clip the predicted x0 to `[-clip_sample_range, clip_sample_range]`.
        set_alpha_to_one: whether the last step ends at a clean sample (ᾱ = 1) or at ᾱ of timestep 0.
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
        clip_sample: bool = True,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        rescale_betas_zero_snr: bool = False,
    ) -> None:
        require(isinstance(set_alpha_to_one, bool), "set_alpha_to_one", set_alpha_to_one, "true or false")
        super().__init__(set_alpha_to_one)

    def step(
        self,
        model_output: Tensor,
        timestep: SupportsIndex,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
        prev_timestep: SupportsIndex | None = None,
    ) -> SchedulerOutput | tuple[Tensor, Tensor]:
        """One step (Song et al. 2021, eq. 12 and 16), computed in float32 or higher:

            x_prev = √ᾱ_prev x0 + √(1 - ᾱ_prev - σ²) ε + σ z,   σ² = η² (1 - ᾱ_prev)/(1 - ᾱ_t) (1 - ᾱ_t/ᾱ_prev)

        It goes from `timestep` to `previous_timestep(timestep)`. diffusers' class always goes to t - T // N, which is
        equal for "leading" spacing; for other spacings pass that time as `prev_timestep` to reproduce diffusers.

        Args:
            model_output: the network's prediction at `sample`, `(B, ...)`.
            timestep: t, usually one of `timesteps`. A tensor on a GPU makes the host wait.
            sample: x_t, `(B, ...)`.
            eta: η, at least 0.
            use_clipped_model_output: recompute ε from the clipped x0.
            generator: draws z, also in the last step; a list has one generator per sample. Unused if eta = 0.
            variance_noise: z itself, instead of a generator.
            return_dict: `False` returns a plain tuple.
            prev_timestep: go to this earlier timestep instead; below 0: the end of the chain.

        Raises:
            UserError: t is not within 0..T-1; eta is below 0 or too large; epsilon prediction with ᾱ_t = 0;
                shapes or the number of generators do not fit.
        """
        require(is_number(eta) and eta >= 0, "eta", eta, "a number, at least 0")
        t, earlier = self._step_times(timestep, prev_timestep)
        x_t, x0, epsilon = self._denoise(model_output, t, sample)
        alpha_bar, alpha_bar_prev = self._alpha_bar_at(t), self._alpha_bar_at(earlier)
        if use_clipped_model_output:
            epsilon = (x_t - math.sqrt(alpha_bar) * x0) / math.sqrt(1 - alpha_bar)

        variance = eta**2 * posterior_variance(alpha_bar, alpha_bar_prev)
        # At zero terminal SNR and eta = 1 the rest for ε is 0; rounding must not make it negative.
        remaining = 1 - alpha_bar_prev - variance
        require(remaining > -1e-9, "eta", eta, f"smaller: its noise exceeds the noise level after timestep {t}")
        x_prev = math.sqrt(alpha_bar_prev) * x0 + math.sqrt(max(remaining, 0.0)) * epsilon
        if eta > 0:
            x_prev = x_prev + math.sqrt(variance) * step_noise(x_t, generator, variance_noise)
        return self._result(x_prev, x0, sample.dtype, return_dict)

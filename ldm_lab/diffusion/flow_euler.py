"""Euler steps of flow matching."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ldm_lab.diffusion.flow import FlowScheduler
from ldm_lab.diffusion.levels import SPREADS
from ldm_lab.diffusion.noise import step_noise
from ldm_lab.diffusion.process import SchedulerOutput
from ldm_lab.utils.arguments import is_number, require, require_choice
from ldm_lab.utils.configurable import register_to_config
from ldm_lab.utils.limits import Count, Positive

SHIFTS = ("exponential", "linear")


class FlowMatchEulerDiscreteScheduler(FlowScheduler):
    """Steps of first order along the predicted velocity: one network evaluation each.

    >>> scheduler = FlowMatchEulerDiscreteScheduler()
    >>> scheduler.set_timesteps(3)
    >>> scheduler.timesteps
    tensor([1000.0000,  500.5000,    1.0000])

    Arguments that are not listed here: see `FlowScheduler`.

    Args:
        use_dynamic_shifting: must be False; `shift` is the shift. The four arguments after it have no effect.
        invert_sigmas: must be False.
        shift_terminal: stretch the levels so that the last one before the end is this one; None: do not.
        use_karras_sigmas: space the levels evenly in t^(1/7), from the first to the last.
        use_exponential_sigmas: the same, evenly in log t.
        use_beta_sigmas: the same, at quantiles of a beta distribution, dense at both ends.
        time_shift_type: "exponential" or "linear", without effect.
        stochastic_sampling: replace the noise in every step: x_prev = (1 - t_prev) x0 + t_prev z.

    Raises:
        UserError: a value is out of range.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: Count = 1000,
        shift: Positive | Literal["latents"] = 1.0,
        use_dynamic_shifting: bool = False,
        base_shift: float | None = 0.5,
        max_shift: float | None = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        invert_sigmas: bool = False,
        shift_terminal: float | None = None,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        time_shift_type: str = "exponential",
        stochastic_sampling: bool = False,
    ) -> None:
        by_image = "false: the shift does not depend on the image; set shift="
        require(use_dynamic_shifting is False, "use_dynamic_shifting", use_dynamic_shifting, by_image)
        require(invert_sigmas is False, "invert_sigmas", invert_sigmas, "false: time 1 is noise here")
        inside = is_number(shift_terminal) and 0 < shift_terminal < 1
        require(shift_terminal is None or inside, "shift_terminal", shift_terminal, "null, or between 0 and 1")
        require_choice("time_shift_type", time_shift_type, SHIFTS)
        for key in (*SPREADS, "stochastic_sampling"):
            require(isinstance(self.config[key], bool), key, self.config[key], "true or false")
        chosen = [key for key in SPREADS if self.config[key]]
        require(len(chosen) < 2, " and ".join(chosen), True, "true for one of them at most")
        super().__init__()

    def _spread(self, sigmas: Tensor) -> Tensor:
        last, spread = self.config.shift_terminal, next((key for key in SPREADS if self.config[key]), None)
        if last is not None:
            few = "more than one level: shift_terminal moves the last one"
            require(len(sigmas) > 1, "num_inference_steps", len(sigmas), few)
            sigmas = 1 - (1 - sigmas) * (1 - last) / (1 - sigmas[-1])
        return sigmas if spread is None else SPREADS[spread](float(sigmas[0]), float(sigmas[-1]), len(sigmas))

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | float,
        sample: Tensor,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, Tensor]:
        """One step from t to the next level, in float32 or higher: x_prev = x_t + (t_prev - t) v.

        Args:
            model_output: v, the network's prediction at `sample`, `(B, ...)`.
            timestep: t T, one of `timesteps`. A tensor on a GPU makes the host wait.
            sample: x_t, `(B, ...)`.
            generator: draws z; a list has one generator per sample. Only used with `stochastic_sampling`.
            variance_noise: z itself, instead of a generator.
            return_dict: `False` returns a plain tuple.

        Raises:
            UserError: there is no such timestep; shapes or the number of generators do not fit.
        """
        place = self._index(timestep)
        t, t_prev = self._sigma[place : place + 2]
        velocity, x_t = self._checked(model_output, sample)
        x0 = x_t - t * velocity
        x_prev = x_t + (t_prev - t) * velocity
        if self.config.stochastic_sampling:
            x_prev = (1 - t_prev) * x0 + t_prev * step_noise(x_t, generator, variance_noise)
        return self._result(x_prev, x0, sample.dtype, return_dict)

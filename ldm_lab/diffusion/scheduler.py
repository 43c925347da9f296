"""Base class of the schedulers of diffusion: noise levels by betas, list of timesteps.

Training (`add_noise`, `get_velocity`) and sampling (`set_timesteps`, `step`) use the same object. Notation:
ᾱ_t is `alphas_cumprod[t]`, α_t = √ᾱ_t the rate of the signal, σ_t = √(1 - ᾱ_t) the rate of the noise.
Constructor arguments and files are those of diffusers' classes of the same names.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Sequence
from typing import SupportsIndex

import torch
from torch import Tensor

from ldm_lab.diffusion.broadcast import dynamic_threshold, per_sample
from ldm_lab.diffusion.parameterization import Parameterization
from ldm_lab.diffusion.process import Process, at_least_float32
from ldm_lab.diffusion.schedules import cumulative_signal, make_betas
from ldm_lab.diffusion.spacing import SPACINGS
from ldm_lab.utils.arguments import is_integer, require
from ldm_lab.utils.errors import UserError
from ldm_lab.utils.transfer import to_device

END = -1  # the "timestep" after the last: a clean sample


class Scheduler(Process):
    """Base of schedulers whose noise levels follow betas, at T whole timesteps.

    A subclass takes its settings as constructor arguments under `register_to_config` (this class reads
    them from `self.config`) and adds `step`.

    Attributes:
        betas: β_t, `(T,)`, float32.
        alphas: 1 - β_t, `(T,)`, float32.
        alphas_cumprod: ᾱ_t, the cumulative product of `alphas`, `(T,)`, float32.
        final_alpha_cumprod: ᾱ after the last step, `()`, float32.
        init_noise_sigma: standard deviation of the starting noise.
        timesteps: the timesteps to visit, descending, `(num_inference_steps,)`, int64.
        num_inference_steps: their number; `None` before `set_timesteps`, when all T are listed.
    """

    def __init__(self, set_alpha_to_one: bool = True) -> None:
        config = self.config
        betas = make_betas(
            config.beta_schedule,
            config.num_train_timesteps,
            config.beta_start,
            config.beta_end,
            config.trained_betas,
            config.rescale_betas_zero_snr,
        )
        self._check_config()
        alpha_bar = cumulative_signal(betas)
        self.betas, self.alphas, self.alphas_cumprod = betas.float(), (1 - betas).float(), alpha_bar.float()
        self.init_noise_sigma = 1.0
        self.num_inference_steps: int | None = None
        self.timesteps = torch.arange(len(betas) - 1, -1, -1, device="cpu")
        # A step needs a few scalars; Python numbers are exact and never wait for a device.
        self._alpha_bar: list[float] = alpha_bar.tolist()
        self._final_alpha_bar = 1.0 if set_alpha_to_one else self._alpha_bar[0]
        self.final_alpha_cumprod = torch.tensor(self._final_alpha_bar, device="cpu")
        # Training needs α_t and σ_t for a batch of t, on the batch's device: (2, T), copied there once.
        self._rates = {torch.device("cpu"): torch.stack([alpha_bar.sqrt(), (1 - alpha_bar).sqrt()]).float()}
        self._earlier: dict[int, int] = {}
        self._clip = config.clip_sample_range if config.get("clip_sample") else None  # some samplers never clip
        if len(self) != config.num_train_timesteps:  # `trained_betas` determine T
            self.register_to_config(num_train_timesteps=len(self))

    def __len__(self) -> int:
        return len(self._alpha_bar)

    # The forward process and its inverse, for a batch with its own timestep per sample.

    @property
    def parameterization(self) -> Parameterization:
        """The prediction type: x0, noise or velocity."""
        return self.parameterizations[self.config.prediction_type]

    def rates(self, timesteps: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
        """α_t and σ_t as float32 tensors that broadcast against `batch`, on its device.

        Args:
            timesteps: `(B,)` or one for all, integers in 0..T-1.
            batch: `(B, ...)`.

        Raises:
            UserError: the number of timesteps does not fit; or a timestep is out of range, which is checked
                only on the CPU, where the check needs no synchronisation.
        """
        if timesteps.device.type == "cpu" and timesteps.numel():
            low, high = int(timesteps.min()), int(timesteps.max())
            require(low >= 0 and high < len(self), "timesteps", [low, high], f"within 0..{len(self) - 1}")
        if batch.device not in self._rates:
            self._rates[batch.device] = to_device(self._rates[torch.device("cpu")], batch.device)
        # A 0-dimensional index would return a view: the host would wait for a GPU, and training could not use a table
        # that validation has copied in inference mode.
        alpha, sigma = self._rates[batch.device][:, to_device(torch.atleast_1d(timesteps), batch.device)]
        return per_sample(alpha, batch), per_sample(sigma, batch)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """v = α_t ε - σ_t x0 (Salimans & Ho 2022), shapes and dtype as in `add_noise`."""
        alpha, sigma = self.rates(timesteps, sample)
        return (alpha * noise - sigma * sample).to(sample.dtype)

    def training_timesteps(self, drawn: Tensor) -> Tensor:
        """Numbers in 0..T -> whole timesteps in 0..T-1, int64."""
        return drawn.long().clamp(max=len(self) - 1)

    # The list of timesteps.

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """Choose the timesteps of sampling: exactly N of them, descending.

        Args:
            num_inference_steps: N in 1..T, spaced by `timestep_spacing`; `steps_offset` is added for "leading".
            device: device of `timesteps`. On the CPU, the default, `step` never waits for a GPU.
            timesteps: the timesteps themselves, instead of N.

        Raises:
            UserError: N or a timestep is out of range, or the timesteps do not descend.
        """
        if (num_inference_steps is None) == (timesteps is None):
            raise UserError("set_timesteps needs either num_inference_steps or timesteps")
        if timesteps is None:
            return self._visit(self._spaced(num_inference_steps), device)
        chosen = [index_of(t) for t in timesteps]
        falls = all(later > earlier for later, earlier in itertools.pairwise(chosen))
        require(bool(chosen) and falls, "timesteps", chosen, "a falling sequence")
        require(chosen[0] < len(self) and chosen[-1] >= 0, "timesteps", chosen, f"within 0..{len(self) - 1}")
        return self._visit(chosen, device)

    def _visit(self, chosen: list[int], device: torch.device | str | None) -> None:
        self._earlier = dict(zip(chosen, [*chosen[1:], END], strict=True))
        self.num_inference_steps = len(chosen)
        self.timesteps = torch.tensor(chosen, dtype=torch.int64, device=device or "cpu")

    def _spaced(self, count: int | None) -> list[int]:
        total, spacing = len(self), self.config.timestep_spacing
        count = require_steps(count, total)
        offset = self.config.steps_offset if spacing == "leading" else 0
        chosen = [t + offset for t in SPACINGS[spacing](count, total)]
        last = f"small enough that {count} steps end before timestep {total}"
        require(chosen[0] < total, "steps_offset", offset, last)
        return chosen

    def previous_timestep(self, timestep: SupportsIndex) -> int:
        """The target of a step from `timestep`: the next entry of `timesteps`, or -1 after the last.

        For a timestep outside of the list it is t - T // N, as in diffusers, or -1 if that is below 0. diffusers' DDIM
        goes to t - T // N from listed timesteps too, which for "linspace" and "trailing" is not the next entry.

        Raises:
            UserError: the timestep is not within 0..T-1.
        """
        t = index_of(timestep)
        require(0 <= t < len(self), "timestep", t, f"within 0..{len(self) - 1}")
        stride = len(self) // (self.num_inference_steps or len(self))
        return self._earlier.get(t, max(t - stride, END))

    # Building blocks of the subclasses' steps. A step has one timestep for the whole batch.

    def _step_times(self, timestep: SupportsIndex, prev_timestep: SupportsIndex | None) -> tuple[int, int]:
        """The timestep of a step, and its target (below 0: the end)."""
        t = index_of(timestep)
        if prev_timestep is None:
            return t, self.previous_timestep(t)
        earlier = index_of(prev_timestep)
        require(0 <= t < len(self), "timestep", t, f"within 0..{len(self) - 1}")
        require(earlier < t, "prev_timestep", earlier, f"below timestep={t}")
        return t, earlier

    def _alpha_bar_at(self, timestep: int) -> float:
        """ᾱ_t in double precision; for t below 0, ᾱ at the end of the chain."""
        return self._alpha_bar[timestep] if timestep >= 0 else self._final_alpha_bar

    def _denoise(
        self, model_output: Tensor, t: int, sample: Tensor, rates: tuple[float, float] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x_t = `sample`, x0, clipped or thresholded as configured, and ε, all in float32 or higher.

        α and σ are those of t, or `rates`.
        """
        x_t = at_least_float32(sample)
        if model_output.shape != x_t.shape:
            raise UserError(f"model_output has shape {tuple(model_output.shape)}, the sample {tuple(x_t.shape)}")
        rates = rates or (math.sqrt(self._alpha_bar[t]), math.sqrt(1 - self._alpha_bar[t]))
        if rates[0] == 0 and self.parameterization.needs_signal:
            raise UserError(
                f"prediction_type={self.config.prediction_type!r} says nothing of x0 at timestep {t}, where "
                "alphas_cumprod is 0 (zero terminal SNR): use 'v_prediction', or rescale_betas_zero_snr=False"
            )
        x0, epsilon = self.parameterization.x0_and_epsilon(model_output.to(x_t.dtype), x_t, *rates)
        config = self.config
        if config.thresholding:
            x0 = dynamic_threshold(x0, config.dynamic_thresholding_ratio, config.sample_max_value)
        elif self._clip is not None:
            x0 = x0.clamp(-self._clip, self._clip)
        return x_t, x0, epsilon


def posterior_variance(alpha_bar_t: float, alpha_bar_prev: float) -> float:
    """Variance of q(x_prev | x_t, x0), β̃_t in Ho et al. 2020, eq. 7, between any two noise levels."""
    return (1 - alpha_bar_prev) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_prev)


def require_steps(count: int | None, most: int) -> int:
    """The number of steps. Raises `UserError` unless it is an integer in 1..`most`."""
    require(is_integer(count) and 1 <= count <= most, "num_inference_steps", count, f"within 1..{most}")
    return count


def index_of(timestep: SupportsIndex) -> int:
    """A timestep as an int. Raises `UserError` unless it is a single integer."""
    try:
        return operator.index(timestep)
    except TypeError:
        raise UserError(f"timestep={timestep!r} is not one whole number: a step has one for the whole batch") from None

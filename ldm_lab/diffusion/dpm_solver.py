"""DPM-Solver++: few steps of high order (Lu et al. 2022, arXiv 2211.01095)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, SupportsIndex

import torch
from torch import Tensor
from typing_extensions import Self

from ldm_lab.diffusion.checks import is_integer, require, require_choice
from ldm_lab.diffusion.noise import step_noise
from ldm_lab.diffusion.scheduler import Scheduler, SchedulerOutput, at_least_float32
from ldm_lab.diffusion.spacing import evenly
from ldm_lab.errors import UserError
from ldm_lab.serialization import register_to_config
from ldm_lab.untrusted import LoadError

# Settings of the namesake by which it leaves the levels of training, at the values by which it does not.
OTHER_LEVELS = {
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_flow_sigmas": False,
    "use_dynamic_shifting": False,
    "lambda_min_clipped": -math.inf,
}
FEW_STEPS = 15  # below, the last steps are of lower order: there the noise levels lie far apart


class Level(NamedTuple):
    """A noise level: α = √ᾱ, σ = √(1 - ᾱ) and λ = log(α / σ), half the logarithm of the SNR."""

    alpha: float
    sigma: float
    log_snr: float

    @classmethod
    def of(cls, alpha_bar: float) -> Level:
        """The level of ᾱ in [0, 1]; λ is -∞ at pure noise and ∞ at a clean sample."""
        alpha, sigma = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
        if not alpha_bar or alpha_bar == 1:
            return cls(alpha, sigma, math.inf if alpha_bar else -math.inf)
        return cls(alpha, sigma, math.log(alpha / sigma))


def midpoint(z: float) -> float:
    """The weight of the second term in the update of order 2, by half a step."""
    return 0.5 * math.expm1(z)


def heun(z: float) -> float:
    """The same by the exact integral of a line: 1 - (e^z - 1) / z, with its sign."""
    return math.expm1(z) / z - 1


SOLVERS: dict[str, Callable[[float], float]] = {"midpoint": midpoint, "heun": heun}
ALGORITHMS = {"dpmsolver++": 1, "sde-dpmsolver++": 2}  # by what the step in λ counts in the exponent


class DPMSolverMultistepScheduler(Scheduler):
    """Solves the ODE of diffusion, or the SDE, with the predictions of x0 at up to three noise levels.

    With `use_lu_lambdas` twenty steps come as close as a hundred of DDIM. It remembers what the last steps predicted:
    the timesteps must be visited in their order, from the first; a new first step forgets.

    The timesteps are N of N + 1 spread levels, the last of which is the end; N = T takes all. They differ from those of
    `DDIMScheduler` but equal those of the class of this name in diffusers (which with N = T visits one of them twice,
    or 0 alone), and so do all steps but two kinds: those of the SDE with order 3, where a sign there is turned around,
    and those after pure noise (zero terminal SNR), for which it puts ᾱ = 2^-24. With `use_lu_lambdas` it takes levels
    between the timesteps and tells the network the nearest timestep; here level and timestep belong together.

    >>> scheduler = DPMSolverMultistepScheduler(beta_schedule="scaled_linear")
    >>> scheduler.set_timesteps(4)
    >>> scheduler.timesteps
    tensor([999, 749, 500, 250])

    Args:
        num_train_timesteps: T.
        beta_start: β of the first timestep.
        beta_end: β of the last timestep.
        beta_schedule: "linear", "scaled_linear" (what CompVis calls "linear") or "squaredcos_cap_v2".
        trained_betas: T betas in place of a schedule.
        solver_order: 1 (which is DDIM), 2 ("2M") or 3 ("3M").
        prediction_type: what the network predicts: "epsilon", "sample" (x0) or "v_prediction".
        thresholding: dynamic thresholding of the predicted x0.
        dynamic_thresholding_ratio: its quantile.
        sample_max_value: upper bound of the threshold, at least 1.
        algorithm_type: "dpmsolver++" solves the ODE, without noise; "sde-dpmsolver++" the SDE.
        solver_type: "midpoint" or "heun", the second term of order 2.
        lower_order_final: with fewer than 15 steps, take the last two with orders 2 and 1.
        euler_at_final: take the last step with order 1.
        use_lu_lambdas: spread the timesteps evenly in λ, from T - 1 to 0, whatever `timestep_spacing` says ("uniform
            logSNR", Lu et al. 2022, arXiv 2206.00927): far more accurate than evenly in t.
        final_sigmas_type: "zero" ends at a clean sample, "sigma_min" at the noise of timestep 0.
        timestep_spacing: "linspace", "leading" or "trailing".
        steps_offset: added to the timesteps of "leading".
        rescale_betas_zero_snr: make the last timestep pure noise; needs "sample" or "v_prediction".

    Raises:
        UserError: an unknown name, or a value out of its range.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        solver_order: int = 2,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        algorithm_type: str = "dpmsolver++",
        solver_type: str = "midpoint",
        lower_order_final: bool = True,
        euler_at_final: bool = False,
        use_lu_lambdas: bool = False,
        final_sigmas_type: str = "zero",
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
    ) -> None:
        require(is_integer(solver_order) and 1 <= solver_order <= 3, "solver_order", solver_order, "1, 2 or 3")
        require_choice("algorithm_type", algorithm_type, ALGORITHMS)
        require_choice("solver_type", solver_type, SOLVERS)
        require_choice("final_sigmas_type", final_sigmas_type, ("zero", "sigma_min"))
        require(isinstance(use_lu_lambdas, bool), "use_lu_lambdas", use_lu_lambdas, "true or false")
        super().__init__(set_alpha_to_one=final_sigmas_type == "zero")
        self._history: list[tuple[Level, Tensor]] = []  # of the steps before, the newest first
        self._next: int | None = None

    @classmethod
    def from_config(cls, config: dict[str, Any], **overrides: Any) -> Self:  # noqa: ANN401
        """Build from the config of any scheduler.

        Raises:
            LoadError: it is one of the namesake with noise levels that this class does not have.
        """
        for key, value in OTHER_LEVELS.items():
            if config.get(key, value) != value:
                raise LoadError(f"{key}={config[key]!r} is not supported by {cls.__name__}; {value!r} is")
        return super().from_config(config, **overrides)

    def _spaced(self, count: int | None) -> list[int]:
        total, spacing = len(self), self.config.timestep_spacing
        spread = is_integer(count) and 1 <= count < total  # with N = T there is no further level
        if self.config.use_lu_lambdas and spread:
            return self._spaced_in_log_snr(count)
        if spacing == "trailing" or not spread:
            return super()._spaced(count)
        if spacing == "linspace":
            return [round(index * (total - 1) / count) for index in range(count, 0, -1)]
        chosen = [index * (total // (count + 1)) + self.config.steps_offset for index in range(count, 0, -1)]
        require(chosen[0] < total, "steps_offset", self.config.steps_offset, f"small enough for {count} steps")
        return chosen

    def _spaced_in_log_snr(self, count: int) -> list[int]:
        # λ of pure noise is -∞: in its place that of ᾱ = 2^-24, below any other.
        log_snr = [Level.of(max(alpha_bar, 2**-24)).log_snr for alpha_bar in self._alpha_bar]
        at_zero = self.config.final_sigmas_type == "sigma_min"  # then timestep 0 is where the chain ends
        return evenly(count + at_zero, log_snr)[:count]

    def step(
        self,
        model_output: Tensor,
        timestep: SupportsIndex,
        sample: Tensor,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, Tensor]:
        """One step, from `timestep` to the next one of `timesteps`, in float32 at least.

        With h the step in λ, the predictions D0, D1, ... of x0 here and before as a polynomial in λ, c = 1 for the
        ODE and 2 for the SDE (arXiv 2211.01095, eq. 9, algorithm 2 and section 5.3; h is positive):

            x_prev = σ_prev/σ_t e^{-(c-1)h} x_t + α_prev (1 - e^{-ch}) D0 + ... + σ_prev √(1 - e^{-2h}) z (SDE alone)

        Args:
            model_output: what the network predicts at `sample`, `(B, ...)`.
            timestep: t, the one of `timesteps` that is due. A tensor on a GPU is waited for.
            sample: x_t, `(B, ...)`.
            generator: draws z; a list has one generator per sample. Not used for the ODE.
            variance_noise: z itself, instead of a generator.
            return_dict: `False` for a plain tuple.

        Raises:
            UserError: `set_timesteps` was not called; t is not the one that is due; epsilon prediction where
                ᾱ_t = 0; shapes or the number of generators do not fit.
        """
        t, earlier = self._step_times(timestep, None)
        self._expect(t, earlier)
        x_t = at_least_float32(sample)
        x0, _ = self._denoise(model_output, t, x_t)
        here, target = Level.of(self._alpha_bar_at(t)), Level.of(self._alpha_bar_at(earlier))
        self._history = [(here, x0), *self._history][: self.config.solver_order]

        count, h = ALGORITHMS[self.config.algorithm_type], target.log_snr - here.log_snr
        decay = 1.0 if count == 1 else math.exp(-h)
        x_prev = target.sigma / here.sigma * decay * x_t
        x_prev = x_prev - target.alpha * self._integral(-count * h, h, self._order(earlier))
        if count == 2 and target.sigma:
            noise = step_noise(x_t, generator, variance_noise)
            x_prev = x_prev + target.sigma * math.sqrt(-math.expm1(-2 * h)) * noise
        output = SchedulerOutput(x_prev.to(sample.dtype), x0.to(sample.dtype))
        return output if return_dict else tuple(output)

    def _expect(self, t: int, earlier: int) -> None:
        """Refuse a step out of order: the predictions before it would be of other levels than it takes them for."""
        if t == int(self.timesteps[0]):
            self._history = []
        elif t != self._next:
            raise UserError(f"timestep={t}, but {self._next} is due: a multistep solver visits them in their order")
        self._next = earlier

    def _order(self, earlier: int) -> int:
        """Of this step: as many predictions as there are, fewer at the end."""
        config, few = self.config, self.config.lower_order_final and self.num_inference_steps < FEW_STEPS
        order = len(self._history)
        clean = config.final_sigmas_type == "zero"
        # "sigma_min" is where timestep 0 is already: that step has no length, and so no order.
        if earlier < 0 and (few or config.euler_at_final or clean or not self.timesteps[-1]):
            return 1
        return min(order, 2) if few and earlier == int(self.timesteps[-1]) else order

    def _integral(self, z: float, h: float, order: int) -> Tensor:
        """∫ e^λ x0(λ) dλ up to a factor, x0 being the polynomial through the last `order` predictions.

        Args:
            z: -c h, what stands in the exponent.
            h: the step in λ.
            order: number of predictions.
        """
        (here, newest), *before = self._history
        first = math.expm1(z)  # e^z - 1, below 0
        if order == 1:
            return first * newest
        (one, second), *rest = before
        r0 = (here.log_snr - one.log_snr) / h
        slope = (newest - second) / r0
        if order == 2:
            return first * newest + SOLVERS[self.config.solver_type](z) * slope
        two, third = rest[0]
        r1 = (one.log_snr - two.log_snr) / h
        older = (second - third) / r1
        bend = (slope - older) / (r0 + r1)
        slope = slope + r0 * bend
        return first * newest + (first / z - 1) * slope + ((first - z) / z**2 - 0.5) * bend

"""DPM-Solver++ sampler: few steps of high order (Lu et al. 2022, arXiv 2211.01095)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, SupportsIndex

import torch
from torch import Tensor
from typing_extensions import Self

from ldm_lab.diffusion.levels import SPREADS, Level, flow, timesteps_at
from ldm_lab.diffusion.multistep import ALGORITHMS, SOLVERS, by_data, by_noise, integral
from ldm_lab.diffusion.noise import step_noise
from ldm_lab.diffusion.parameterization import PARAMETERIZATIONS, Flow
from ldm_lab.diffusion.process import SchedulerOutput
from ldm_lab.diffusion.scheduler import Scheduler, index_of, require_steps
from ldm_lab.diffusion.spacing import SPACINGS, evenly
from ldm_lab.utils.arguments import is_integer, is_number, require, require_choice
from ldm_lab.utils.configurable import register_to_config
from ldm_lab.utils.errors import UserError
from ldm_lab.utils.reading import LoadError

FEW_STEPS = 15  # with fewer steps the last ones have lower order, as levels are far apart
LEVELS = (*SPREADS, "use_lu_lambdas", "use_flow_sigmas")  # settings that override `timestep_spacing`
ROUNDING = 1e-4  # a level this close below a timestep counts as that timestep
LOWEST = 2**-24  # replaces ᾱ = 0, pure noise, for spacings in the logarithm of the SNR


class DPMSolverMultistepScheduler(Scheduler):
    """Solves the diffusion ODE or SDE with the predictions at up to three noise levels.

    With `use_lu_lambdas` twenty steps are as accurate as a hundred of DDIM. The solver stores the last predictions, so
    timesteps must be visited in order; a new first step clears the history. A chain may begin at any timestep.

    The timesteps are the first N of N + 1 spaced levels, the last level being the end; N = T takes all. They differ
    from those of `DDIMScheduler` but equal those of diffusers' class of this name (which for N = T visits a timestep
    twice, or only 0). All steps equal diffusers' except two kinds: SDE steps of order 3, where diffusers flips a sign,
    and steps after pure noise (zero terminal SNR), where diffusers uses ᾱ = 2^-24. With `use_lu_lambdas` diffusers uses
    levels between timesteps and passes the network the nearest timestep; here level and timestep match. With "trailing"
    and `lambda_min_clipped` diffusers may visit fewer than N timesteps; here there are always N.

    >>> scheduler = DPMSolverMultistepScheduler(beta_schedule="scaled_linear")
    >>> scheduler.set_timesteps(4)
    >>> scheduler.timesteps
    tensor([999, 749, 500, 250])

    Arguments that are not listed here: see `SchedulerSettings`.

    Args:
        solver_order: 1 (which is DDIM), 2 ("2M") or 3 ("3M").
        prediction_type: also "flow_prediction" (ε - x0), with `use_flow_sigmas`.
        algorithm_type: from predictions of x0, "dpmsolver++" solves the ODE and "sde-dpmsolver++" the SDE; from
            predictions of ε, "dpmsolver" and "sde-dpmsolver" do, which cannot end at a clean sample.
        solver_type: "midpoint" or "heun", for the second term of order 2.
        lower_order_final: with fewer than 15 steps, take the last two steps with orders 2 and 1.
        euler_at_final: take the last step with order 1.
        use_karras_sigmas: use N levels between the timesteps, from that of T - 1 to that of 0, even in (σ/α)^(1/7);
            overrides `timestep_spacing`. The network gets a nearby timestep, which may repeat.
        use_exponential_sigmas: the same, even in log(σ/α).
        use_beta_sigmas: the same, at quantiles of a beta distribution, dense at both ends.
        use_lu_lambdas: space the timesteps evenly in λ, from T - 1 to 0; overrides `timestep_spacing` ("uniform
            logSNR", Lu et al. 2022, arXiv 2206.00927). It is far more accurate than even spacing in t.
        use_flow_sigmas: use the levels of a straight path from data to noise, x_t = (1 - σ) x0 + σ ε, for a network
            trained on this path; only for sampling.
        flow_shift: shifts these levels towards noise; 1: no shift; see `levels.flow`.
        final_sigmas_type: "zero" ends at a clean sample, "sigma_min" at the noise of timestep 0.
        lambda_min_clipped: omit timesteps whose λ is below; use -5.1 for the cosine schedule.
        variance_type: learned variances are rejected, as the networks here predict none.

    Raises:
        UserError: a name is unknown, or a value is out of range.
    """

    parameterizations: ClassVar = {**PARAMETERIZATIONS, "flow_prediction": Flow()}

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
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        use_lu_lambdas: bool = False,
        use_flow_sigmas: bool = False,
        flow_shift: float = 1.0,
        final_sigmas_type: str = "zero",
        lambda_min_clipped: float = -math.inf,
        variance_type: str | None = None,
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
    ) -> None:
        self._check_solver()
        super().__init__(set_alpha_to_one=final_sigmas_type == "zero")
        log_snr = [Level.of(alpha_bar).log_snr for alpha_bar in self._alpha_bar]  # descending
        self._usable = sum(value >= lambda_min_clipped for value in log_snr)
        require(self._usable > 0, "lambda_min_clipped", lambda_min_clipped, f"at most {log_snr[0]:.4g}")
        self._history: list[tuple[Level, Tensor]] = []  # of the previous steps, newest first
        self._visited: list[int] = []
        self._levels: list[Level] = []  # levels of `_visited`, and of the end
        self._due: int | None = None  # index of the next step

    @classmethod
    def from_config(cls, config: dict[str, Any], **overrides: Any) -> Self:  # noqa: ANN401
        """Build from the config of any scheduler.

        Raises:
            LoadError: it is a diffusers config with an image-dependent shift of the levels.
        """
        if config.get("use_dynamic_shifting"):
            raise LoadError(f"use_dynamic_shifting=True is not supported by {cls.__name__}; False is")
        return super().from_config(config, **overrides)

    def _check_solver(self) -> None:
        config, order, shift = self.config, self.config.solver_order, self.config.flow_shift
        require(is_integer(order) and 1 <= order <= 3, "solver_order", order, "1, 2 or 3")
        require_choice("algorithm_type", config.algorithm_type, ALGORITHMS)
        require_choice("solver_type", config.solver_type, SOLVERS)
        require_choice("final_sigmas_type", config.final_sigmas_type, ("zero", "sigma_min"))
        for key in ("lower_order_final", "euler_at_final", *LEVELS):
            require(isinstance(config[key], bool), key, config[key], "true or false")
        chosen = [key for key in LEVELS if config[key]]
        require(len(chosen) < 2, " and ".join(chosen), True, "true for one of them at most")
        require(is_number(shift) and shift > 0, "flow_shift", shift, "a number above 0")
        lowest, learned = config.lambda_min_clipped, str(config.variance_type).startswith("learned")
        require(is_number(lowest) or lowest == -math.inf, "lambda_min_clipped", lowest, "a number, or -inf for none")
        require(not learned, "variance_type", config.variance_type, "null: the networks here predict no variance")
        straight = config.prediction_type != "flow_prediction" or config.use_flow_sigmas
        require(straight, "prediction_type", config.prediction_type, "another one without use_flow_sigmas=true")
        if ALGORITHMS[config.algorithm_type][0] is by_noise:
            wanted = f"'sigma_min' with algorithm_type={config.algorithm_type!r}, which never reaches a clean sample"
            require(config.final_sigmas_type == "sigma_min", "final_sigmas_type", config.final_sigmas_type, wanted)

    def rates(self, timesteps: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
        """See `Scheduler.rates`. Raises `UserError` with `use_flow_sigmas`, whose levels do not follow the betas."""
        if self.config.use_flow_sigmas:
            raise UserError("use_flow_sigmas=True: the scheduler samples, and cannot add noise at a timestep")
        return super().rates(timesteps, batch)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """Choose the timesteps of sampling, as `Scheduler.set_timesteps`, or levels between them.

        Raises:
            UserError: also for `timesteps` if the config uses levels between the timesteps.
        """
        between = next((key for key in (*SPREADS, "use_flow_sigmas") if self.config[key]), None)
        if between is None:
            return super().set_timesteps(num_inference_steps, device, timesteps)
        if timesteps is not None:
            raise UserError(f"timesteps cannot be given with {between}=True: pass num_inference_steps")
        count, total = require_steps(num_inference_steps, len(self)), len(self)
        if between == "use_flow_sigmas":
            sigmas = flow(total, self.config.flow_shift, count)
            times = (sigmas * total + ROUNDING).long()
            return self._visit(times.tolist(), device, [Level.of_flow(sigma) for sigma in sigmas.tolist()])
        alpha_bar = torch.tensor(self._alpha_bar, dtype=torch.float64, device="cpu").clamp(min=LOWEST)
        table = ((1 - alpha_bar) / alpha_bar).sqrt()
        ratios = SPREADS[between](float(table[-1]), float(table[0]), count)
        times = timesteps_at(ratios, table)
        # Rounding as in diffusers: Karras levels to the nearest, except for the cosine schedule; all others down.
        nearest = between == "use_karras_sigmas" and self.config.beta_schedule != "squaredcos_cap_v2"
        times = times.round() if nearest else (times + ROUNDING).floor()
        return self._visit(times.long().tolist(), device, [Level.of_ratio(ratio) for ratio in ratios.tolist()])

    def _visit(
        self, chosen: list[int], device: torch.device | str | None, levels: Sequence[Level] | None = None
    ) -> None:
        super()._visit(chosen, device)
        levels = [Level.of(self._alpha_bar[t]) for t in chosen] if levels is None else levels
        end = Level.of(self._final_alpha_bar)
        if self.config.use_flow_sigmas:
            end = Level.of_flow(end.sigma / end.alpha)
        # The last level may equal the end, up to rounding; no step may go back.
        self._visited, self._levels = chosen, [*levels, max(levels[-1], end, key=lambda level: level.log_snr)]
        self._due, self._history = None, []

    def _spaced(self, count: int | None) -> list[int]:
        total, spacing = self._usable, self.config.timestep_spacing
        count = require_steps(count, total)
        if self.config.use_lu_lambdas and count < total:  # for N = T there is no further level
            return self._spaced_in_log_snr(count)
        if spacing == "linspace" and count < total:
            return [round(index * (total - 1) / count) for index in range(count, 0, -1)]
        if spacing == "leading" and count < total:
            chosen = [index * (total // (count + 1)) for index in range(count, 0, -1)]
        else:
            chosen = SPACINGS[spacing](count, total)
        offset = self.config.steps_offset if spacing == "leading" else 0
        require(chosen[0] + offset < len(self), "steps_offset", offset, f"small enough for {count} steps")
        return [t + offset for t in chosen]

    def _spaced_in_log_snr(self, count: int) -> list[int]:
        # λ of pure noise is -∞; use that of an ᾱ below all others.
        log_snr = [Level.of(max(alpha_bar, LOWEST)).log_snr for alpha_bar in self._alpha_bar[: self._usable]]
        at_zero = self.config.final_sigmas_type == "sigma_min"  # then the chain ends at timestep 0
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
        """One step from `timestep` to the next entry of `timesteps`, in float32 or higher.

        With h the (positive) step in λ, the current and previous predictions D0, D1, ... of x0 as a polynomial in λ,
        c = 1 for the ODE and 2 for the SDE (arXiv 2211.01095, eq. 9, algorithm 2 and section 5.3):

            x_prev = σ_prev/σ_t e^{-(c-1)h} x_t + α_prev (1 - e^{-ch}) D0 + ... + σ_prev √(1 - e^{-2h}) z (SDE only)

        Args:
            model_output: the network's prediction at `sample`, `(B, ...)`.
            timestep: t, the next one of `timesteps`; any of them for the first step. A tensor on a GPU makes the
                host wait.
            sample: x_t, `(B, ...)`.
            generator: draws z; a list has one generator per sample. Unused for the ODE.
            variance_noise: z itself, instead of a generator.
            return_dict: `False` returns a tuple of only the sample, as in diffusers.

        Raises:
            UserError: `set_timesteps` was not called; t is out of order; epsilon prediction with ᾱ_t = 0; shapes
                or the number of generators do not fit.
        """
        place = self._place(index_of(timestep))
        here, target = self._levels[place : place + 2]
        x_t, x0, epsilon = self._denoise(model_output, self._visited[place], sample, (here.alpha, here.sigma))
        make_update, count = ALGORITHMS[self.config.algorithm_type]
        if make_update is by_noise and self.config.thresholding:
            epsilon = (x_t - here.alpha * x0) / here.sigma
        self._history = [(here, x0 if make_update is by_data else epsilon), *self._history][: self.config.solver_order]

        update = make_update(here, target, count)
        h = target.log_snr - here.log_snr
        known, weigh = self._history[: self._order(place, h)], SOLVERS[self.config.solver_type]
        x_prev = update.keep * x_t + update.gain * integral(known, update.exponent, h, weigh)
        if update.noise:
            x_prev = x_prev + update.noise * step_noise(x_t, generator, variance_noise)
        x_prev = x_prev.to(sample.dtype)
        return SchedulerOutput(x_prev, x0.to(sample.dtype)) if return_dict else (x_prev,)

    def _place(self, t: int) -> int:
        """Index of this step in the list.

        A step out of order is rejected, as the stored predictions would belong to other levels.
        """
        if self.num_inference_steps is None:
            raise UserError("no timesteps yet: call set_timesteps(num_inference_steps) before step")
        due, visited = self._due, self._visited
        if due is None or due == len(visited) or visited[due] != t:
            if t not in visited:
                raise UserError(f"timestep={t} is not one of the {len(visited)} in scheduler.timesteps")
            if t != visited[0] and due not in (None, len(visited)):
                raise UserError(
                    f"timestep={t}, but {visited[due]} is due: a multistep solver visits them in their order"
                )
            due, self._history = visited.index(t), []
        self._due = due + 1
        return due

    def _order(self, place: int, h: float) -> int:
        """Order of this step: the number of stored predictions, lower at the end."""
        config, left = self.config, len(self._visited) - place
        few = config.lower_order_final and len(self._visited) < FEW_STEPS
        # With "sigma_min" the last level may already be the end: a step of length 0 has no order.
        if left == 1 and (few or config.euler_at_final or config.final_sigmas_type == "zero" or not h):
            return 1
        return min(len(self._history), 2) if few and left == 2 else len(self._history)

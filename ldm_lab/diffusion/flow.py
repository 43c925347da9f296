"""Flow matching: the straight path from data to noise, x_t = (1 - t) x0 + t ε, and the noise levels of its samplers.

Liu et al. 2022, arXiv 2209.03003 (rectified flow); Lipman et al. 2022, arXiv 2210.02747. The network predicts the
velocity dx/dt = ε - x0. Its timestep is t T with T = `num_train_timesteps`, any number in 0..T. Arguments and files are
those of diffusers' classes `FlowMatchEulerDiscreteScheduler` and `FlowMatchHeunDiscreteScheduler`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from ldm_lab.diffusion.broadcast import per_sample
from ldm_lab.diffusion.parameterization import Flow, Parameterization
from ldm_lab.diffusion.process import Process, at_least_float32
from ldm_lab.diffusion.scheduler import require_steps
from ldm_lab.utils.arguments import is_integer, is_number, require
from ldm_lab.utils.errors import UserError
from ldm_lab.utils.transfer import to_device

LATENTS = "latents"  # a shift by the size of the latents
UNSHIFTED = 4096  # numbers in the latents for which that shift is 1: those of 256 x 256 images at f8 and 4 channels


class FlowScheduler(Process):
    """Base of the samplers of flow matching: σ = t is the level of a timestep t T.

    A subclass takes its settings as constructor arguments under `register_to_config`, and adds `step`.

    Args of all subclasses:
        num_train_timesteps: T, the network's timestep at pure noise.
        shift: s in t -> s t / (1 + (s - 1) t) (Esser et al. 2024, arXiv 2403.03206, eq. 23), of the times of training
            and the levels of sampling: above 1 more of them are noisy. "latents": s = √(C h w / 4096), set when
            training begins, as latents of more numbers need more noise to be hidden.

    Attributes:
        sigmas: the levels of sampling and the end, 0: `(number of levels + 1,)`, float32.
        timesteps: the timestep of each network evaluation, float32; before `set_timesteps` all T levels.
    """

    init_noise_sigma = 1.0
    parameterizations: ClassVar[Mapping[str, Parameterization]] = {"flow_prediction": Flow()}

    def __init__(self) -> None:
        total, shift = self.config.num_train_timesteps, self.config.shift
        require(is_integer(total) and total >= 1, "num_train_timesteps", total, "a whole number, at least 1")
        wanted = f"a number above 0, or {LATENTS!r}"
        require(shift == LATENTS or (is_number(shift) and shift > 0), "shift", shift, wanted)
        self._list_all()

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    @property
    def library(self) -> str:
        """`ldm_lab`, as diffusers' `LDMPipeline` cannot run its own classes of these names."""
        library = super().library
        return "ldm_lab" if library == "diffusers" else library

    @classmethod
    def from_config(cls, config: dict[str, Any], **overrides: Any) -> Self:  # noqa: ANN401
        """Build from the config of a scheduler of flow matching, ours or diffusers'.

        Raises:
            UserError: it is the config of a diffusion, whose models predict something else.
        """
        if "beta_schedule" in config:
            kind = config.get("_class_name", "a scheduler of diffusion")
            raise UserError(f"{cls.__name__} cannot be built from the config of {kind}: it samples flow matching alone")
        return super().from_config(config, **overrides)

    @property
    def parameterization(self) -> Parameterization:
        """The prediction of ε - x0."""
        return self.parameterizations["flow_prediction"]

    def fit(self, shape: Sequence[int]) -> None:
        """With `shift="latents"`, set the shift √(C h w / 4096) of latents of this shape, `(C, h, w)`."""
        if self.config.shift == LATENTS:
            self.register_to_config(shift=math.sqrt(math.prod(shape) / UNSHIFTED))
            self._list_all()

    def rates(self, timesteps: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
        """1 - t and t as float32 tensors that broadcast against `batch`, on its device.

        Args:
            timesteps: `(B,)` or one for all, numbers in 0..T.
            batch: `(B, ...)`.

        Raises:
            UserError: the number of timesteps does not fit; or one is out of range, checked only on the CPU.
        """
        if timesteps.device.type == "cpu" and timesteps.numel():
            low, high = float(timesteps.min()), float(timesteps.max())
            require(low >= 0 and high <= len(self), "timesteps", [low, high], f"within 0..{len(self)}")
        t = per_sample(to_device(timesteps.float(), batch.device) / len(self), batch)
        return 1 - t, t

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """`add_noise` under the name and with the order of arguments of diffusers."""
        return self.add_noise(sample, noise, timestep)

    def training_timesteps(self, drawn: Tensor) -> Tensor:
        """Numbers in 0..T -> shifted timesteps in 0..T, float32: they need not be whole."""
        return (self._shifted(drawn.double() / len(self)) * len(self)).float()

    def _shifted(self, t: Tensor) -> Tensor:
        """The shift of eq. 23, `(B,)`, float64."""
        shift = self.config.shift
        if shift == LATENTS:
            raise UserError(f"shift={LATENTS!r}: a number is set when training begins; for sampling give a number")
        return shift * t / (1 + (shift - 1) * t)

    # The levels of sampling.

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> None:
        """Choose the levels of sampling.

        Args:
            num_inference_steps: N in 1..T, the number of network evaluations.
            device: device of `timesteps`. On the CPU, the default, `step` never waits for a GPU.
            sigmas: levels, to be shifted, instead of N.
            mu: must be None: the shift does not depend on the image.
            timesteps: the timesteps themselves, instead of N: they are not shifted. (diffusers shifts the levels of
                given timesteps, and warns that the two then differ.)

        Raises:
            UserError: not one of N, `sigmas` and `timesteps` is given; N or a level is out of range; or the levels do
                not fall.
        """
        if mu is not None:
            raise UserError(f"mu={mu}: the shift does not depend on the image; set shift= of {type(self).__name__}")
        if sum(given is not None for given in (num_inference_steps, sigmas, timesteps)) != 1:
            raise UserError("set_timesteps needs one of num_inference_steps, sigmas and timesteps")
        if timesteps is not None:
            chosen = _numbers(dict.fromkeys(map(float, timesteps))) / len(self)  # Heun's method lists most levels twice
            return self._visit(self._falling("timesteps", chosen), device)
        if sigmas is not None:
            chosen = self._falling("sigmas", _numbers(map(float, sigmas)))
            return self._visit(self._spread(self._shifted(chosen)), device)
        count = require_steps(num_inference_steps, len(self))
        # As diffusers does: even from 1 to the shifted 1/T, then shifted (again).
        least = float(self._shifted(_numbers([1 / len(self)])))
        even = torch.linspace(1.0, least, self._levels(count), dtype=torch.float64, device="cpu")
        return self._visit(self._spread(self._shifted(even)), device, count)

    def _levels(self, count: int) -> int:
        """Number of levels for `count` evaluations."""
        return count

    def _evaluations(self, count: int | None, levels: int) -> list[int]:
        """Index of the level of each evaluation, of `count` evaluations if that is a number."""
        return list(range(levels))

    def _spread(self, sigmas: Tensor) -> Tensor:
        """Apply settings that move shifted levels, `(levels,)`; a subclass may have some."""
        return sigmas

    def _falling(self, name: str, sigmas: Tensor) -> Tensor:
        """Given levels, `(levels,)`. Raises `UserError` unless they fall and lie in (0, 1]."""
        falls = len(sigmas) > 0 and bool((sigmas.diff() < 0).all())
        scale = len(self) if name == "timesteps" else 1
        require(falls, name, (sigmas * scale).tolist(), "a falling sequence")
        require(float(sigmas[-1]) > 0 and float(sigmas[0]) <= 1, name, (sigmas * scale).tolist(), f"within 0..{scale}")
        return sigmas

    def _list_all(self) -> None:
        sigmas = torch.linspace(1.0, 1 / len(self), len(self), dtype=torch.float64, device="cpu")
        self._visit(sigmas if self.config.shift == LATENTS else self._shifted(sigmas), None)
        self.num_inference_steps = None

    def _visit(self, sigmas: Tensor, device: torch.device | str | None, count: int | None = None) -> None:
        evaluated = self._evaluations(count, len(sigmas))
        # The network sees float32. The levels are the float32 numbers too: a given timestep is found by its value.
        self.sigmas = torch.cat([sigmas, sigmas.new_zeros(1)]).float()
        self._sigma: list[float] = self.sigmas.tolist()
        times = (self.sigmas * len(self))[evaluated]
        self._visited: list[float] = times.tolist()
        self.num_inference_steps = len(evaluated)
        self.timesteps = times.to(device or "cpu")

    # Building blocks of a step.

    def _index(self, timestep: Tensor | float) -> int:
        """The first evaluation at a timestep. Raises `UserError` if there is none."""
        try:
            t = float(timestep)
        except (TypeError, ValueError, RuntimeError):
            raise UserError(f"timestep={timestep!r} is not one number: a step has one for the whole batch") from None
        if t not in self._visited:
            raise UserError(f"timestep={t:g} is not one of the {len(self._visited)} in scheduler.timesteps")
        return self._visited.index(t)

    @staticmethod
    def _checked(model_output: Tensor, sample: Tensor) -> tuple[Tensor, Tensor]:
        """Velocity and x_t, in float32 or higher. Raises `UserError` if the shapes differ."""
        x_t = at_least_float32(sample)
        if model_output.shape != x_t.shape:
            raise UserError(f"model_output has shape {tuple(model_output.shape)}, the sample {tuple(x_t.shape)}")
        return model_output.to(x_t.dtype), x_t


def is_flow(kind: Any) -> bool:  # noqa: ANN401
    """Whether a class is a scheduler of flow matching."""
    return isinstance(kind, type) and issubclass(kind, FlowScheduler)


def _numbers(values: Iterable[float]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.float64, device="cpu")

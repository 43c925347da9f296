"""Autoguidance: a model is guided by a smaller or less trained version of itself.

Karras et al. 2024, "Guiding a Diffusion Model with a Bad Version of Itself" (arXiv 2406.02507), section 4:
with the denoised samples D of both networks at the same x_t, a step uses

    D = D_guide + w (D_main - D_guide)

within an interval of noise levels, and D_main outside (Kynkäänniemi et al. 2024, arXiv 2404.07724). At a fixed x_t
every prediction type is an affine function of D, and the weights w and 1 - w add up to 1: the same combination of two
predictions of one type is the prediction of the combined D.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ldm_lab.diffusion.parameterization import Parameterization
from ldm_lab.diffusion.scheduler import Scheduler
from ldm_lab.utils.arguments import is_number
from ldm_lab.utils.errors import UserError


class Denoiser(Protocol):
    """Protocol of a denoising network: `network(latents, timestep).sample`."""

    dtype: torch.dtype

    def __call__(self, sample: Tensor, timestep: Tensor) -> Any:  # noqa: ANN401
        """`(B, C, h, w)` and a timestep -> an object with `.sample` of the same shape."""


class Prediction(NamedTuple):
    """A network's output: `sample` `(B, C, h, w)`."""

    sample: Tensor


@dataclass(frozen=True)
class Guidance:
    """How strongly the guide acts, and at which noise levels.

    Attributes:
        scale: w. 1: the main network alone; above 1: away from the guide; 0: the guide alone.
        interval: (low, high): the guide acts where low < σ/α <= high, the noise level that Karras et al. 2022 call σ;
            None: everywhere.

    Raises:
        UserError: the scale is negative or not finite, or the interval is not two rising numbers.
    """

    scale: float = 1.0
    interval: Sequence[float] | None = None

    def __post_init__(self) -> None:
        if not is_number(self.scale) or self.scale < 0:
            raise UserError(f"guidance_scale={self.scale!r}: must be a number, at least 0; 1 is without guidance")
        given = self.interval
        if given is not None and not (_is_pair(given) and 0 <= given[0] < given[1]):
            raise UserError(
                f"guidance_interval={given!r}: must be two rising noise levels from 0 on, such as [0.2, 5], or null"
            )

    @property
    def slug(self) -> str:
        """Part of a file name with all digits, as other digits are another setting: guided2_0.25_5."""
        numbers = (self.scale, *(self.interval or ()))
        return "guided" + "_".join(repr(float(number)).removesuffix(".0") for number in numbers)

    def acts_at(self, level: float) -> bool:
        """Whether the guide has an effect at the noise level σ/α."""
        return self.scale != 1 and (self.interval is None or self.interval[0] < level <= self.interval[1])

    def evaluations(self, scheduler: Scheduler) -> int:
        """Number of evaluations of the guide over the scheduler's timesteps, after its `set_timesteps`."""
        return sum(self.acts_at(noise_level(scheduler, t)) for t in scheduler.timesteps.tolist())


NO_GUIDANCE = Guidance()


def _is_pair(value: Any) -> bool:  # noqa: ANN401
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    return is_list and len(value) == 2 and all(is_number(end) for end in value)


def noise_level(scheduler: Scheduler, timestep: float) -> float:
    """σ/α at a timestep of any scheduler; infinite at pure noise.

    Between the timesteps of training, where some schedulers of diffusers step, log ᾱ is interpolated. On a straight
    path (flow matching) the timestep itself says σ = t / T.
    """
    alpha_bar = getattr(scheduler, "alphas_cumprod", None)
    if alpha_bar is None or scheduler.config.get("use_flow_sigmas"):
        sigma = timestep / scheduler.config.num_train_timesteps
        return sigma / (1 - sigma) if sigma < 1 else math.inf
    low, part = int(timestep), timestep - int(timestep)
    signal = float(alpha_bar[low])
    if part:
        signal = signal ** (1 - part) * float(alpha_bar[low + 1]) ** part
    return math.sqrt((1 - signal) / signal) if signal else math.inf


class GuidedModel:
    """Main network and guide as one network, in the main network's prediction type; for `denoise`.

    Args:
        main: the network to sample from.
        guide: the network to guide it with, of the same prediction type (see `Converted`).
        scheduler: knows the noise level of a timestep.
        guidance: scale and interval.
    """

    def __init__(self, main: Denoiser, guide: Denoiser, scheduler: Scheduler, guidance: Guidance) -> None:
        self.main, self.guide, self.scheduler, self.guidance = main, guide, scheduler, guidance

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the main network."""
        return self.main.dtype

    def at(self, timestep: Tensor) -> Denoiser:
        """The network to evaluate at a timestep on the CPU: outside the interval the main network alone."""
        return self if self.guidance.acts_at(noise_level(self.scheduler, timestep.item())) else self.main

    def __call__(self, sample: Tensor, timestep: Tensor) -> Prediction:
        """The guided prediction at `sample`, `(B, C, h, w)`: guide + w (main - guide), float32."""
        # A copy, as the CUDA graph of a compiled guide may overwrite the main network's output.
        main = self.main(sample, timestep).sample.to(torch.float32, copy=True)
        guide = self.guide(sample.to(self.guide.dtype), timestep).sample.float()
        return Prediction(guide + self.guidance.scale * (main - guide))


class Converted(nn.Module):
    """A network, seen as a network of another prediction type; computes the conversion in float32.

    Args:
        network: the network.
        scheduler: the scheduler of its training, whose prediction type it has.
        target: the prediction type to convert to.

    Raises:
        UserError: the network predicts noise, and the schedule begins at pure noise, where noise says nothing of x0.
    """

    def __init__(self, network: nn.Module, scheduler: Scheduler, target: Parameterization) -> None:
        super().__init__()
        if scheduler.parameterization.needs_signal and not float(scheduler.alphas_cumprod[-1]):
            raise UserError(
                f"a guide with prediction_type={scheduler.config.prediction_type} says nothing of x0 at the last"
                " timestep, where alphas_cumprod is 0 (zero terminal SNR): take a guide with v_prediction or sample"
            )
        self.network, self.scheduler, self.target = network, scheduler, target

    @property
    def config(self) -> Any:  # noqa: ANN401
        """Config of the network."""
        return self.network.config

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the network."""
        return self.network.dtype

    def forward(self, sample: Tensor, timestep: Tensor) -> Prediction:
        """The prediction at `sample`, `(B, C, h, w)`; a timestep between two takes the rates of the nearest."""
        prediction, x_t = self.network(sample, timestep).sample.float(), sample.float()
        alpha, sigma = self.scheduler.rates(timestep.round().long(), x_t)
        x0, epsilon = self.scheduler.parameterization.x0_and_epsilon(prediction, x_t, alpha, sigma)
        return Prediction(self.target.target(x0, epsilon, alpha, sigma))


def guided(main: Denoiser, guide: Denoiser | None, scheduler: Scheduler, guidance: Guidance) -> Denoiser:
    """The network for `denoise`: at scale 1 the main network itself, without any evaluation of the guide.

    Raises:
        UserError: the scale is not 1, and there is no guide.
    """
    if guidance.scale == 1:
        return main
    if guide is None:
        raise UserError(
            f"guidance_scale={guidance.scale:g}: there is no guide; give a smaller or less trained UNet of the same"
            " latents, LDMPipeline(..., guide=unet), or leave guidance_scale=1"
        )
    return GuidedModel(main, guide, scheduler, guidance)


def require_same_latents(main: nn.Module, guide: nn.Module) -> None:
    """Raise `UserError` unless the UNets `main` and `guide` take latents of the same channels and size."""
    for key in ("in_channels", "out_channels", "sample_size"):
        ours, theirs = main.config[key], guide.config[key]
        if ours != theirs:
            raise UserError(
                f"the guide has {key}={theirs} and the model {key}={ours}: take a guide of the same latents"
            )

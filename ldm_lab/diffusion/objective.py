"""Denoising objective: add noise, predict, weight the error.

The network is a function `predict(x_t, t)`; the draw of timesteps, the error measure and its weighting
are arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ldm_lab.diffusion.parameterization import Parameterization
from ldm_lab.diffusion.process import Process
from ldm_lab.diffusion.timesteps import DrawTimesteps, discretize, stratified
from ldm_lab.utils.arguments import is_number, require
from ldm_lab.utils.errors import UserError
from ldm_lab.utils.randomness import generator


class L2Loss:
    """Squared error, averaged over each sample."""

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        """`(B, ...)`, `(B, ...)` -> `(B,)`."""
        return (prediction - target).square().flatten(1).mean(1)


class L1Loss:
    """Absolute error, averaged over each sample."""

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        """`(B, ...)`, `(B, ...)` -> `(B,)`."""
        return (prediction - target).abs().flatten(1).mean(1)


class Weighting(Protocol):
    """Protocol of loss weights by noise level."""

    def __call__(self, snr: Tensor, parameterization: Parameterization) -> Tensor:
        """Weights `(B,)` for signal-to-noise ratios ᾱ_t / (1 - ᾱ_t), `(B,)`."""


class PlainWeighting:
    """Weight 1 for every noise level ("simple" objective, Ho et al. 2020, eq. 14)."""

    def __call__(self, snr: Tensor, parameterization: Parameterization) -> Tensor:
        """Ones, `(B,)`."""
        return torch.ones_like(snr)


class MinSNRWeighting:
    """Min-SNR-γ (Hang et al. 2023, arXiv 2303.09556, section 3.4): weights the error in x0 by min(SNR, γ).

    By prediction type the weight is min(SNR, γ) for x0, min(SNR, γ) / SNR for the noise and
    min(SNR, γ) / (SNR + 1) for the velocity.

    At SNR = 0, the last timestep with zero terminal SNR, the weight is 1, as in the plain objective. The formula gives
    0 there (0/0 for the noise), so the first step of sampling, which starts at that timestep, would never be trained.
    The target there is x0, or -x0 for the velocity, and it is only one timestep of T.

    >>> from ldm_lab.diffusion.parameterization import Epsilon
    >>> MinSNRWeighting(gamma=5.0)(torch.tensor([0.1, 50.0]), Epsilon())
    tensor([1.0000, 0.1000])

    Args:
        gamma: γ, above 0.
    """

    def __init__(self, gamma: float = 5.0) -> None:
        require(is_number(gamma) and gamma > 0, "gamma", gamma, "a number above 0")
        self.gamma = gamma

    def __call__(self, snr: Tensor, parameterization: Parameterization) -> Tensor:
        """Weights `(B,)`."""
        weights = snr.clamp(max=self.gamma) / parameterization.error_scale(snr)
        return weights.masked_fill(snr == 0, 1.0)


@dataclass
class DenoisingObjective:
    """The training loss of a diffusion model, per sample and in float32.

    Args:
        scheduler: adds the noise and defines the prediction type.
        loss: `L2Loss()` or `L1Loss()`.
        weighting: `PlainWeighting()` or `MinSNRWeighting(gamma)`.
        timesteps: `UniformTimesteps()`, `LowDiscrepancyTimesteps()` or `LogitNormalTimesteps(mean, std)`.

    Raises:
        UserError: epsilon prediction with zero terminal SNR, where noise does not determine a clean sample.
    """

    scheduler: Process
    loss: Callable[[Tensor, Tensor], Tensor]
    weighting: Weighting
    timesteps: DrawTimesteps

    def __post_init__(self) -> None:
        if self.scheduler.parameterization.needs_signal and self.scheduler.alphas_cumprod[-1] == 0:
            raise UserError(
                f"prediction_type={self.scheduler.config.prediction_type!r} cannot be trained with zero terminal SNR: "
                "set prediction_type=v_prediction, or rescale_betas_zero_snr=false"
            )

    def draw_timesteps(self, seed: int, positions: Tensor | Sequence[int], batch_size: int) -> Tensor:
        """Timesteps `(B,)`, on the CPU, of the images at `positions` of the training stream.

        They are whole, int64, or of flow matching any numbers, float32.

        Args:
            seed: the seed of the run.
            positions: places in the global stream of training images, `(B,)`.
            batch_size: size of the global batch, over all devices and micro-batches.
        """
        drawn = self.timesteps(seed, positions, batch_size, len(self.scheduler))
        return self.scheduler.training_timesteps(drawn)

    def validation_timesteps(self, count: int) -> Tensor:
        """Fixed timesteps for `count` held-out images, evenly spaced over the range, `(count,)`, int64.

        They are shuffled, the same way in all runs. Held-out images are sorted by name, and so often by class; with
        ordered timesteps each part of the range would be measured on different classes.
        """
        order = torch.randperm(count, generator=generator(0, "order of validation timesteps"))
        return self.at(stratified(count)[order])

    def at(self, fractions: Tensor) -> Tensor:
        """Timesteps at fractions of the range of time, in [0, 1); 0 is the least noise."""
        return discretize(fractions, len(self.scheduler))

    def target(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The training target, `(B, ...)`."""
        return self.scheduler.get_target(x0, noise, timesteps)

    def __call__(
        self, predict: Callable[[Tensor, Tensor], Tensor], x0: Tensor, noise: Tensor, timesteps: Tensor
    ) -> Tensor:
        """The weighted loss of each sample, `(B,)`, float32.

        Args:
            predict: the network, `(x_t (B, ...), t (B,)) -> (B, ...)`.
            x0: clean samples, `(B, ...)`.
            noise: standard normal, of the same shape.
            timesteps: `(B,)`, see `draw_timesteps`.

        Raises:
            UserError: the shapes of x0, the noise and the prediction differ.
        """
        if noise.shape != x0.shape:
            raise UserError(f"noise has shape {tuple(noise.shape)}, the samples {tuple(x0.shape)}")
        timesteps = timesteps.to(x0.device)
        prediction = predict(self.scheduler.add_noise(x0, noise, timesteps), timesteps)
        if prediction.shape != x0.shape:
            raise UserError(f"the network predicts shape {tuple(prediction.shape)} for samples {tuple(x0.shape)}")
        error = self.loss(prediction.float(), self.target(x0.float(), noise.float(), timesteps))
        return error * self.weighting(self.scheduler.snr(timesteps), self.scheduler.parameterization)

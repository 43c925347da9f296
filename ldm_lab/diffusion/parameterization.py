"""Prediction types of a network, and their conversion to x0 and noise.

With α = √ᾱ_t and σ = √(1 - ᾱ_t) a noisy sample is x_t = α x0 + σ ε (Ho et al. 2020, eq. 4), so either of
x0 and ε, or a fixed combination of them, determines both. α and σ are numbers, or tensors that broadcast
against the samples.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

Rate = Tensor | float


class Parameterization(ABC):
    """A prediction type of a network.

    Attributes:
        needs_signal: whether the prediction does not determine x0 if ᾱ_t = 0.
    """

    needs_signal = False

    @abstractmethod
    def target(self, x0: Tensor, epsilon: Tensor, alpha: Rate, sigma: Rate) -> Tensor:
        """The training target."""

    @abstractmethod
    def x0_and_epsilon(self, prediction: Tensor, x_t: Tensor, alpha: Rate, sigma: Rate) -> tuple[Tensor, Tensor]:
        """Clean sample and noise from a prediction at x_t."""

    @abstractmethod
    def error_scale(self, snr: Tensor) -> Tensor:
        """k(SNR) in |prediction error|² = k(SNR) |x0 error|², where SNR = α² / σ²."""


class Epsilon(Parameterization):
    """The network predicts the noise (Ho et al. 2020, section 3.2)."""

    needs_signal = True

    def target(self, x0: Tensor, epsilon: Tensor, alpha: Rate, sigma: Rate) -> Tensor:
        """ε."""
        return epsilon

    def x0_and_epsilon(self, prediction: Tensor, x_t: Tensor, alpha: Rate, sigma: Rate) -> tuple[Tensor, Tensor]:
        """x0 = (x_t - σ ε) / α."""
        return (x_t - sigma * prediction) / alpha, prediction

    def error_scale(self, snr: Tensor) -> Tensor:
        """α² / σ²."""
        return snr


class Sample(Parameterization):
    """The network predicts the clean sample."""

    def target(self, x0: Tensor, epsilon: Tensor, alpha: Rate, sigma: Rate) -> Tensor:
        """x0."""
        return x0

    def x0_and_epsilon(self, prediction: Tensor, x_t: Tensor, alpha: Rate, sigma: Rate) -> tuple[Tensor, Tensor]:
        """ε = (x_t - α x0) / σ."""
        return prediction, (x_t - alpha * prediction) / sigma

    def error_scale(self, snr: Tensor) -> Tensor:
        """1."""
        return torch.ones_like(snr)


class Velocity(Parameterization):
    """The network predicts v = α ε - σ x0 (Salimans & Ho 2022, arXiv 2202.00512, section 4)."""

    def target(self, x0: Tensor, epsilon: Tensor, alpha: Rate, sigma: Rate) -> Tensor:
        """α ε - σ x0."""
        return alpha * epsilon - sigma * x0

    def x0_and_epsilon(self, prediction: Tensor, x_t: Tensor, alpha: Rate, sigma: Rate) -> tuple[Tensor, Tensor]:
        """x0 = α x_t - σ v and ε = σ x_t + α v, a rotation since α² + σ² = 1."""
        return alpha * x_t - sigma * prediction, sigma * x_t + alpha * prediction

    def error_scale(self, snr: Tensor) -> Tensor:
        """1 / σ²."""
        return snr + 1


class Flow(Parameterization):
    """The network predicts v = ε - x0 on a straight path, where α = 1 - σ (Liu et al. 2022, arXiv 2209.03003)."""

    def target(self, x0: Tensor, epsilon: Tensor, alpha: Rate, sigma: Rate) -> Tensor:
        """ε - x0."""
        return epsilon - x0

    def x0_and_epsilon(self, prediction: Tensor, x_t: Tensor, alpha: Rate, sigma: Rate) -> tuple[Tensor, Tensor]:
        """x0 = x_t - σ v and ε = x_t + α v."""
        return x_t - sigma * prediction, x_t + alpha * prediction

    def error_scale(self, snr: Tensor) -> Tensor:
        """1 / σ² = (1 + α/σ)²."""
        return (1 + snr.sqrt()).square()


PARAMETERIZATIONS: dict[str, Parameterization] = {
    "epsilon": Epsilon(),
    "sample": Sample(),
    "v_prediction": Velocity(),
}

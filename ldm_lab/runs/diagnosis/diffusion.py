"""Checks of stage 2: scale of the latents, learning, overfitting."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ldm_lab.diffusion import objective
from ldm_lab.diffusion.ddim import DDIMScheduler
from ldm_lab.diffusion.flow_euler import FlowMatchEulerDiscreteScheduler
from ldm_lab.runs.diagnosis.finding import UNKNOWN, Finding, Healthy, Readings, in_range, missing, unless_learning
from ldm_lab.utils.errors import UserError
from ldm_lab.utils.nested import find

# A measured scale gives 1 on training images; held-out images differ by a few hundredths (demo: 1.0).
SCALE = Healthy(low=0.8, high=1.25, bad_below=0.5, bad_above=2.0)
# Loss as a fraction of the loss of predicting zero. The demo ends at 0.13; users of CompVis report churches stuck at 1
# (0.798, the mean of |N(0, 1)|, with L1).
LEARNED = Healthy(high=0.6, bad_above=0.9)
# val/loss over the loss on training images: the demo ends at 1.04.
BY_HEART = Healthy(high=1.15, bad_above=1.5)
# The newest val/loss over the lowest: the demo ends at its lowest.
RISEN = Healthy(high=1.05, bad_above=1.25)


def scale(readings: Readings) -> Finding:
    """Whether the scaled latents have standard deviation 1, as the noise schedule assumes."""
    check, metric = "scale of the latents", "val/latent_std"
    if not readings.values(metric):
        return missing(check, metric)
    advice = "Set model.scaling_factor=measure, under another name="
    return in_range(check, readings.values(metric)[-1], "standard deviation {:.3g}", SCALE, advice)


def learned(readings: Readings) -> Finding:
    """Whether the network is better than predicting zero."""
    check, metric = "better than predicting zero", "val/loss"
    if not readings.values(metric):
        return missing(check, metric)
    spread = readings.values("val/latent_std") or [1.0]
    try:
        zero = loss_of_zero(readings.config, spread[-1])
    except UserError as error:
        return Finding(check, UNKNOWN, f"the loss of predicting zero is unknown for this objective: {error}")
    loss = readings.values(metric)[-1]
    words = f"val/loss is {loss:.3g}, {{:.2g}} times the {zero:.3g} of predicting zero"
    advice = "Lower model.optimizer.lr, look at the scale of the latents, or train longer (max_images)"
    return unless_learning(readings, metric, in_range(check, loss / zero, words, LEARNED, advice))


def overfitting(readings: Readings) -> Finding:
    """Whether the loss on held-out images stays close to the loss on training images."""
    check, metric = "learning by heart", "val/loss_on_training_images"
    held_out, trained_on = readings.values("val/loss"), readings.values(metric)
    if not held_out or not trained_on:
        return missing(check, metric)
    words = "val/loss is {:.3g} times the loss on training images"
    advice = (
        "Stop earlier (the lowest val/loss), use more images or data.flip=true, or model.unet.dropout=0.1;"
        " compare samples with their nearest training images"
    )
    return in_range(check, held_out[-1] / trained_on[-1] if trained_on[-1] else math.nan, words, BY_HEART, advice)


def risen(readings: Readings) -> Finding:
    """Whether val/loss has risen above its minimum."""
    check, metric = "held-out loss", "val/loss"
    values = [value for value in readings.values(metric) if math.isfinite(value)]
    if not values:
        return missing(check, metric)
    at = next(images for images, value in readings.curves[metric] if value == min(values))
    words = f"val/loss is {{:.3g}} times its lowest, {min(values):.3g} at {at:,} images"
    advice = "val/loss rises: lower model.optimizer.lr, or stop earlier (max_images); snapshots= keeps earlier models"
    return in_range(check, values[-1] / min(values) if min(values) > 0 else math.nan, words, RISEN, advice)


def loss_of_zero(config: dict[str, Any], std: float = 1.0) -> float:
    """Mean loss over all timesteps of a network that predicts zero.

    A target is a·x0 + b·ε with E[ε²] = 1 and E[x0²] = std², so that E[target²] = a² std² + b²; the mean absolute value
    is that of a normal distribution, √(2/π) times the root.

    Args:
        config: the stage's config, with `model.scheduler` and `model.objective`.
        std: standard deviation of the scaled latents, whose mean is 0.

    Raises:
        UserError: a part is not of this package; the message names it.
    """
    of_flow = ".FlowMatch" in str(find(config, "model.scheduler._target_"))
    make = FlowMatchEulerDiscreteScheduler.from_config if of_flow else DDIMScheduler.from_config
    scheduler = make(_arguments(config, "model.scheduler"))
    timesteps = torch.arange(len(scheduler))
    weighting = _part(config, "model.objective.weighting", ("PlainWeighting", "MinSNRWeighting"))
    measure = _part(config, "model.objective.loss", ("L2Loss", "L1Loss"))
    alpha, sigma = scheduler.rates(timesteps, timesteps)  # (T,)
    predicted, one, none = scheduler.parameterization, torch.ones_like(alpha), torch.zeros_like(alpha)
    square = (predicted.target(one, none, alpha, sigma) * std) ** 2 + predicted.target(none, one, alpha, sigma) ** 2
    cost: Tensor = square if isinstance(measure, objective.L2Loss) else (square * 2 / math.pi).sqrt()
    return float((cost * weighting(scheduler.snr(timesteps), predicted)).mean())


def _part(config: dict[str, Any], key: str, known: tuple[str, ...]) -> Any:  # noqa: ANN401
    """Build a part of the objective. Raises `UserError` unless the config names one of the `known` classes."""
    target = find(config, f"{key}._target_")
    module, _, name = str(target).rpartition(".")
    if module != objective.__name__ or name not in known:
        raise UserError(f"{key}={target}")
    try:
        return getattr(objective, name)(**_arguments(config, key))
    except TypeError as error:
        raise UserError(f"{key}: {error}") from error


def _arguments(config: dict[str, Any], key: str) -> dict[str, Any]:
    node = find(config, key)
    if not isinstance(node, dict):
        raise UserError(f"{key} is not in the config")
    return {name: value for name, value in node.items() if not name.startswith("_")}

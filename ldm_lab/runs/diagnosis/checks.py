"""Runs all checks of a stage."""

from __future__ import annotations

from collections.abc import Callable

from ldm_lab.runs.diagnosis import autoencoder, diffusion, training
from ldm_lab.runs.diagnosis.finding import Finding, Readings

Check = Callable[[Readings], Finding | None]

ALWAYS: tuple[Check, ...] = (
    training.finite, training.loss, training.gradients, training.learning_rate, training.throughput,
)  # fmt: skip
OF_STAGE: dict[str, tuple[Check, ...]] = {
    "autoencoder": (
        autoencoder.reconstruction,
        autoencoder.colours,
        autoencoder.spread,
        autoencoder.codebook,
        autoencoder.discriminator,
    ),
    "diffusion": (diffusion.scale, diffusion.learned, diffusion.overfitting, diffusion.risen),
}


def diagnose(readings: Readings) -> list[Finding]:
    """The findings of all checks of the stage, in reading order."""
    findings = [check(readings) for check in (*OF_STAGE[readings.stage], *ALWAYS)]
    return [finding for finding in findings if finding]

"""Checks of stage 1: reconstructions, colours, spread of the latents, codebook, discriminator."""

from __future__ import annotations

import math
from dataclasses import replace

from ldm_lab.runs.diagnosis.finding import BAD, Finding, Healthy, Readings, in_range, missing, unless_learning
from ldm_lab.utils.nested import find

# dB on held-out images. Published values on ImageNet: 27.4 (VQ-f4) and 24.2 (KL-f8); the demo ends at 27.
PSNR = Healthy(low=24.0, bad_below=15.0)
# Share of the colourful pixels of held-out images.
HUES = Healthy(low=0.75, bad_below=0.4)
# Stage 2 divides by the measured scale, so only a degenerate spread is bad. The demo ends at 0.64.
SPREAD = Healthy(low=0.05, high=20.0, bad_below=1e-3, bad_above=1e3)
# Perplexity as a fraction of all codes, and the fewest codes in use. The demo ends at 0.6 of 512 codes; `CodebookUse`
# reports a collapse below 0.01 or two codes.
CODES, FEWEST = Healthy(low=0.1, bad_below=0.01), 2
# Mean hinge loss, and the distance of the mean logits: the ranges of `DiscriminatorHealth`. A discriminator that always
# outputs 0 has loss 1.
HINGE = Healthy(low=0.3, high=1.0, bad_below=0.01)
BLIND = 1e-3


def reconstruction(readings: Readings) -> Finding:
    """Whether the autoencoder reconstructs held-out images."""
    check, metric = "reconstructions", "val/psnr"
    if not readings.values(metric):
        return missing(check, metric)
    advice = (
        "Stage 2 cannot restore lost detail: train longer (max_images), compress less (model=vq_f4), or check the data"
        " in samples/reconstructions_*.png"
    )
    return unless_learning(
        readings, metric, in_range(check, readings.values(metric)[-1], "{:.1f} dB PSNR", PSNR, advice)
    )


def colours(readings: Readings) -> Finding | None:
    """Whether the reconstructions keep the hues of held-out images; None for a run of before this was measured."""
    check, metric = "colours", "val/hues_kept"
    if not readings.values(metric):
        return None
    advice = (
        "The reconstructions are grey or of wrong colours, and so will be all samples: train longer (max_images), or"
        " start with colours (model.start=thumbnail, see docs/colours.md)"
    )
    words = "the hue of {:.2g} of the colourful pixels is kept"
    return unless_learning(readings, metric, in_range(check, readings.values(metric)[-1], words, HUES, advice))


def spread(readings: Readings) -> Finding:
    """Whether a scaling factor can correct the standard deviation of the latents."""
    check, metric = "spread of the latents", "val/latent_std"
    if not readings.values(metric):
        return missing(check, metric)
    advice = "Lower model.optimizer.lr; stage 2 needs model.scaling_factor=measure"
    return in_range(check, readings.values(metric)[-1], "standard deviation {:.3g}", SPREAD, advice)


def codebook(readings: Readings) -> Finding | None:
    """Whether enough codes are in use; None if there is no codebook."""
    codes = find(readings.config, "model.autoencoder.num_vq_embeddings")
    check, metric = "codebook", "codebook/perplexity"
    if not isinstance(codes, int) or codes < 1:
        return None
    if not readings.values(metric):
        return missing(check, metric)
    perplexity = readings.values(metric)[-1]
    words = f"perplexity {perplexity:.3g} of {codes:,} codes, a fraction of {{:.2g}}"
    advice = "Lower model.optimizer.lr, or let the codes follow faster (model.legacy_codebook_loss=false)"
    healthy = replace(CODES, bad_below=max(CODES.bad_below, FEWEST / codes))
    return in_range(check, perplexity / codes, words, healthy, advice)


def discriminator(readings: Readings) -> Finding | None:
    """Whether the discriminator wins or is blind; None if there is none, or before it begins."""
    if not find(readings.config, "model.loss.discriminator"):
        return None
    check, metrics = "discriminator", ("disc/discriminator", "disc/logits_real", "disc/logits_fake")
    begins = find(readings.config, "model.loss.adversarial.start_images")
    if isinstance(begins, int) and readings.images_seen <= begins:
        return None
    for metric in metrics:
        if not readings.values(metric):
            return missing(check, metric)
    hinge, real, fake = (readings.recent(metric) for metric in metrics)
    gap, verdict = abs(real - fake), HINGE.verdict(hinge)
    verdict = BAD if not gap >= BLIND or math.isnan(hinge) else verdict
    measured = f"loss {hinge:.2g}, mean logits {real:.2g} for images and {fake:.2g} for reconstructions"
    advice = (
        "The discriminator wins: lower model.optimizer.lr, start it later (model.loss.adversarial.start_images) or make"
        " it smaller (model.loss.discriminator.channels)"
        if hinge < HINGE.low
        else "The discriminator does not tell images from reconstructions: give it time, or start it later"
        " (model.loss.adversarial.start_images)"
    )
    return Finding(check, verdict, measured, f"loss {HINGE}, logits apart", advice)

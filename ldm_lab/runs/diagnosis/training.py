"""Checks of both stages: finite values, loss, gradients, learning rate, speed."""

from __future__ import annotations

import math

from ldm_lab.runs.diagnosis.finding import BAD, LOOK, OK, Finding, Healthy, Readings, in_range, median, missing, tail
from ldm_lab.utils.nested import find

# Newest quarter over the median of all: the demo, on a shared machine, had 0.5 and 0.6.
SPEED = Healthy(low=0.7)
# Newest tenth over the first tenth: the demo ends at 0.2 in both stages.
LOSS = Healthy(high=1.2, bad_above=2.0)
# Largest norm of the newest tenth over the median of all.
SPIKE = Healthy(high=20.0)
VANISHED = 1e-7


def finite(readings: Readings) -> Finding:
    """Whether all logged values are finite."""
    check = "numbers"
    broken = {
        metric: next(images for images, value in curve if not math.isfinite(value))
        for metric, curve in readings.curves.items()
        if not all(math.isfinite(value) for _, value in curve)
    }
    if not broken:
        return Finding(check, OK, f"all {len(readings.curves)} metrics are finite")
    first = min(broken, key=lambda metric: broken[metric])
    others = f" and {len(broken) - 1} other(s)" if len(broken) > 1 else ""
    advice = "Try trainer.precision=32-true, a lower model.optimizer.lr, or trainer.gradient_clip_val=1"
    return Finding(check, BAD, f"{first}{others} not finite, from {broken[first]:,} images on", "all finite", advice)


def loss(readings: Readings) -> Finding:
    """Whether the training loss has fallen; prefers `train/nll`, as a discriminator changes the sum when it begins."""
    check, metric = "training loss", "train/nll" if "train/nll" in readings.curves else "train/loss"
    values = [value for value in readings.values(metric) if math.isfinite(value)]
    if len(values) < 2:
        return missing(check, metric)
    ratio = median(tail(values, 0.1)) / max(abs(median(values[: max(1, len(values) // 10)])), 1e-12)
    advice = "The loss has grown: lower model.optimizer.lr, or set trainer.gradient_clip_val=1"
    return in_range(check, ratio, f"{metric} is {{:.3g}} times its first values", LOSS, advice)


def gradients(readings: Readings) -> Finding:
    """Whether the gradient norm is steady and has not vanished."""
    check, metric = "gradients", "train/grad_norm"
    values = [value for value in readings.values(metric) if math.isfinite(value)]
    if not values:
        return missing(check, metric)
    usual = median(values)
    if usual < VANISHED:
        advice = "Nothing is learned: is anything frozen (model.train), or is model.optimizer.lr far too high?"
        return Finding(check, BAD, f"the norm is {usual:.2g}", f"above {VANISHED:g}", advice)
    clip = find(readings.config, "trainer.gradient_clip_val")
    words = f"the norm is {usual:.3g}, lately up to {{:.3g}} times as large"
    words += f"; clipped at {clip:g}" if isinstance(clip, (int, float)) and clip else ""
    advice = "Single batches have large gradients: set trainer.gradient_clip_val=1, or lower model.optimizer.lr"
    return in_range(check, max(tail(values, 0.1)) / usual, words, SPIKE, advice)


def learning_rate(readings: Readings) -> Finding:
    """Whether the learning rate stays above zero until shortly before the end."""
    check, metric = "learning rate", "train/lr"
    curve = readings.curves.get(metric)
    planned = find(readings.config, "max_images")
    if not curve or not isinstance(planned, int):
        return missing(check, metric)
    images, now = curve[-1]
    top = max(value for _, value in curve)
    measured = f"{now:.2g} at {images:,} of {planned:,} images, {top:.2g} at most"
    healthy = "above zero until the last tenth of the training"
    if not top > 0:
        return Finding(check, BAD, measured, healthy, "Nothing is learned: raise model.optimizer.lr")
    stuck = now < 0.01 * top and images < 0.9 * planned and images > curve[0][0]
    advice = "The schedule ends before the training does: compare model.schedule with max_images"
    return Finding(check, LOOK if stuck else OK, measured, healthy, advice)


def throughput(readings: Readings) -> Finding:
    """Whether training is as fast as before."""
    check, metric = "speed", "perf/images_per_second"
    values = readings.values(metric)
    if not values:
        return missing(check, metric)
    usual, now = median(values), median(tail(values, 0.25))
    words = f"{now:.3g} images per second lately, {{:.2g}} times the usual {usual:.3g}"
    advice = "Does another job use the machine? Is the disk full or remote? data.num_workers may be too low"
    return in_range(check, now / usual if usual else math.nan, words, SPEED, advice)

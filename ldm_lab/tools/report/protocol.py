"""Decides whether metrics of several runs are comparable, and gives the first reason if they are not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ldm_lab.runs.record import Evaluation, StageRecord
from ldm_lab.runs.settings import is_harmless
from ldm_lab.utils.nested import find, flatten

Settings = dict[str, Any]

# Settings that define a held-out loss; the seed of its noise does not.
DEFINING = {
    ("diffusion", "val/loss"): (
        "model.objective.loss", "model.objective.weighting", "model.scheduler", "model.scaling_factor",
        "autoencoder_hash",
    ),
    ("autoencoder", "val/loss"): ("model.loss.pixel", "model.loss.perceptual", "model.loss.perceptual_weight"),
}  # fmt: skip
ONLY_SAMPLING = ("clip_sample", "clip_sample_range", "timestep_spacing", "steps_offset", "set_alpha_to_one", "shift")
ONLY_TRAINING = ("flip", "random_crop", "seed")  # held-out images have centre crops


def other_images(records: Sequence[StageRecord]) -> str | None:
    """Why metrics on held-out images are not comparable; None: the images are the same."""
    marks = [record.images.get("val") for record in records]
    known = all(marks)
    if known and len(set(marks)) > 1:
        return "the held-out images differ (data.npz)"
    settings = [_of_held_out_images(record, with_root=not known) for record in records]
    return first_difference(settings, "the held-out images differ")


def _of_held_out_images(record: StageRecord, with_root: bool) -> Settings:
    place = "data.module.val_set" if find(record.config, "data.module.val_set") else "data"
    settings = flatten(find(record.config, place))
    kept = {key: value for key, value in settings.items() if not is_harmless(f"{place}.{key}", record.config)}
    kept = {key: value for key, value in kept.items() if key.rpartition(".")[2] not in ONLY_TRAINING}
    kept |= {"root": settings.get("root")} if with_root else {}
    return {f"data.{key}": value for key, value in kept.items()}


def other_quantity(records: Sequence[StageRecord], metric: str) -> str | None:
    """Why a metric is not the same quantity in these stages; None: it is."""
    return first_difference([_defining(record, metric) for record in records], "another quantity")


def _defining(record: StageRecord, metric: str) -> Settings:
    found: Settings = {}
    loss = "val/loss" if metric.startswith("val/loss") else metric  # also on training images, and by timestep
    for key in DEFINING.get((record.stage, loss), ()):
        part = flatten(find(record.config, key), f"{key}.")
        found |= {name: value for name, value in part.items() if name.rpartition(".")[2] not in ONLY_SAMPLING}
    return found


def first_difference(settings: Sequence[Settings], what: str) -> str | None:
    """`what`, with the first key whose values differ; None: all values are equal."""
    for key in dict.fromkeys(key for setting in settings for key in setting):
        values = list(dict.fromkeys(str(setting.get(key)) for setting in settings))
        if len(values) > 1:
            return f"{what} ({key}: {' and '.join(values)})"
    return None


def does_not_compare(records: Sequence[StageRecord], metric: str) -> str | None:
    """Why a metric of these stages is not comparable; None: it is."""
    return other_images(records) or other_quantity(records, metric)


def measured_differently(evaluations: Sequence[Evaluation]) -> str | None:
    """Why evaluations are not comparable; None: they are."""
    return first_difference([_measurement(evaluation) for evaluation in evaluations], "measured differently")


def alike(having: Sequence[Sequence[Evaluation]]) -> tuple[list[Evaluation], str | None, str]:
    """Choose comparable evaluations of some runs, preferably with the same sampling settings.

    Chooses the newest at an equal number of images, else the newest of each run.

    Args:
        having: for each run one or more evaluations.

    Returns:
        An evaluation for each run; the reason why they are not comparable, or None; a note on them.
    """
    newest_first = [sorted(candidates, key=seen, reverse=True) for candidates in having]
    rules: tuple[tuple[Callable[[Evaluation], Settings], str], ...]
    rules = ((measurement_and_sampling, ""), (_measurement, ", sampled differently"))
    for rule, note in rules:
        for first in newest_first[0]:
            same = [[e for e in candidates if rule(e) == rule(first)] for candidates in newest_first]
            if all(same):
                common = set.intersection(*({seen(e) for e in found} for found in same))
                if common:
                    return [next(e for e in found if seen(e) == max(common)) for found in same], None, note
                return [found[0] for found in same], None, f"{note}, at different numbers of images"
    chosen = [candidates[0] for candidates in newest_first]
    return chosen, measured_differently(chosen), ""


def seen(evaluation: Evaluation) -> int:
    """Training images of the model; 0 if unknown."""
    images = evaluation.content.get("images_seen")
    return images if isinstance(images, int) else 0


def _measurement(evaluation: Evaluation) -> Settings:
    parts = {key: evaluation.content.get(key) for key in ("kind", "num_samples", "extractor", "reference")}
    return {key: value for key, value in flatten(parts).items() if key != "reference.source"}


def measurement_and_sampling(evaluation: Evaluation) -> Settings:
    """The settings of an evaluation apart from its model."""
    return _measurement(evaluation) | flatten(evaluation.content.get("sampling"), "sampling.")

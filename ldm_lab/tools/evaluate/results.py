"""Results of an evaluation: a JSON file in `eval/`, and a printed table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ldm_lab.data.dataset import digest
from ldm_lab.diffusion.guidance import Guidance
from ldm_lab.metrics.distribution import Estimate
from ldm_lab.metrics.reference import Reference
from ldm_lab.runs import metrics
from ldm_lab.tools.evaluate.scores import Scores
from ldm_lab.utils.version import __version__
from ldm_lab.utils.writing import write_json

FORMAT = 1
SETTINGS = ("format", "kind", "images", "images_seen", "num_samples", "sampling", "extractor", "reference", "bootstrap")


def describe(
    source: str,
    kind: str,
    images: str,
    count: int,
    reference: Reference,
    draws: int,
    **more: Any,  # noqa: ANN401
) -> dict[str, Any]:
    """Everything that determines the metrics, as plain data.

    Args:
        source: the source as typed.
        kind: "samples", "images" or "reconstructions".
        images: fingerprint of the evaluated images.
        count: number of evaluated images.
        reference: the reference set.
        draws: replicates of the bootstrap.
        more: `images_seen` and `sampling`, if known.
    """
    header = reference.header
    return {
        "format": FORMAT,
        "source": source,
        "kind": kind,
        "images": images,
        "images_seen": more.get("images_seen"),
        "num_samples": count,
        "sampling": more.get("sampling"),
        "extractor": header["extractor"],
        "reference": {key: header[key] for key in ("source", "fingerprint", "count", "transform")},
        "bootstrap": draws,
        "versions": {"ldm_lab": __version__, "torch": torch.__version__},
    }


def file_name(content: Mapping[str, Any]) -> str:
    """File name of an evaluation, without extension; equal exactly for equal settings."""
    sampling = content["sampling"]
    how = ["{sampler}_{steps}_eta{eta:g}_seed{seed}".format(**sampling)] if sampling else []
    how += [f"ema{sampling['ema']}"] if sampling and "ema" in sampling else []
    if sampling and "guidance" in sampling:
        how.append(Guidance(sampling["guidance"], sampling["guidance_interval"]).slug)
    at = [f"at{content['images_seen']}"] if content["images_seen"] is not None else []
    settings = {key: content[key] for key in SETTINGS}
    settings["reference"] = {key: value for key, value in content["reference"].items() if key != "source"}
    key = digest([json.dumps(settings, sort_keys=True)])[:8]
    return "_".join([content["kind"], str(content["num_samples"]), *how, *at, content["extractor"]["name"], key])


def write(folder: Path, content: dict[str, Any], scores: Scores, **beside: Any) -> Path:  # noqa: ANN401
    """Write an evaluation; replaces only an evaluation of the same settings."""
    metrics = {name: as_json(one) for name, one in scores.items()}
    path = folder / f"{file_name(content)}.json"
    write_json(path, {**content, "metrics": metrics, **beside})
    return path


def as_json(estimate: Estimate) -> dict[str, float]:
    """The value, and the ends of its interval if it has one."""
    return {key: value for key, value in estimate._asdict().items() if value is not None}


def table(scores: Scores, held_out: Mapping[str, Any]) -> str:
    """A line for each metric, with the score of held-out images."""
    width = max(map(len, scores))
    real = held_out.get("metrics", {})
    head = f"{held_out['count']:,} held-out" if real else ""
    lines = [f"  {'':{width}}  {'value':>10}  {'95 % interval':22}  {head:14}  better"]
    for name, one in scores.items():
        interval = "" if one.low is None else f"{one.low:.4g} to {one.high:.4g}"
        known = metrics.find(f"eval/{name}")
        better = known.better if known else "lower"
        floor = f"{real[name]['value']:.4g}" if name in real else ""
        lines.append(f"  {name:{width}}  {one.value:>10.4g}  {interval:22}  {floor:14}  {better}")
    return "\n".join(lines)

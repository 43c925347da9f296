"""Writes the model card of a result, for people and for the hub: description, metrics, settings and a picture."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from ldm_lab.runs.record import Evaluation, RunRecord, StageRecord, read_run
from ldm_lab.runs.stages import STAGES
from ldm_lab.utils.nested import find
from ldm_lab.utils.reading import LoadError
from ldm_lab.utils.version import __version__
from ldm_lab.utils.writing import replacing

CARD = "README.md"
MARK = "# written by ldm_lab, and again when there are new figures; without this line it is left alone"
PICTURES = {"autoencoder": "reconstructions", "diffusion": "samples"}
MADE_WITH = (
    "data.image_size",
    "data.channels",
    "data.value_range",
    "max_images",
    "data.global_batch_size",
    "model.optimizer.lr",
    "seed",
    "autoencoder_hash",
)
USE = {
    "autoencoder": """from ldm_lab import {kind}

autoencoder = {kind}.from_pretrained("{folder}")
latents = autoencoder.latents(images)            # (B, C, H, W) in [-1, 1] -> (B, c, h, w)
images = autoencoder.decode(latents).sample""",
    "diffusion": """from ldm_lab import LDMPipeline

pipe = LDMPipeline.from_pretrained("{folder}")
images = pipe(batch_size=4, num_inference_steps=50{options}).images""",
}


def write(run: RunRecord, stage: str, metrics: dict[str, float]) -> None:
    """Write the card of a stage's result, with the newest picture; for stage 2 also into the run's folder.

    A card without `MARK` belongs to the user, and stays unchanged.

    Args:
        run: record of the run, with this stage.
        stage: name of the stage.
        metrics: metric -> value of the result.
    """
    record = run.stages[stage]
    pictures = record.pictures.get(PICTURES[stage], {})
    picture = pictures[max(pictures)] if pictures else None
    run_folder = record.folder.parent
    for folder in [record.folder / "final", *([run_folder] if stage == STAGES[1] else [])]:
        path = folder / CARD
        if path.is_file() and MARK not in path.read_text(encoding="utf-8", errors="replace"):
            continue
        if picture:
            with replacing(folder / f"{PICTURES[stage]}.png") as temporary:
                shutil.copyfile(picture, temporary)
        with replacing(path) as temporary:
            card = text(run, record, metrics, bool(picture))
            temporary.write_text(card, encoding="utf-8", errors="backslashreplace")  # names may be invalid text


def refresh(folder: Path) -> None:
    """Rewrite the cards of a run with its newest evaluations; does nothing if the folder is no run."""
    try:
        run = read_run(folder)
    except LoadError:
        return
    for stage, record in run.stages.items():
        if record.status.get("finished") and (record.folder / "final").is_dir():
            write(run, stage, {name: value for name, value in record.status.items() if "/" in name})


def text(run: RunRecord, record: StageRecord, metrics: dict[str, float], pictured: bool) -> str:
    """The text of a card, in Markdown.

    Args:
        run: record of the run, for its evaluations.
        record: record of the stage.
        metrics: metric -> value of the result.
        pictured: whether a picture lies beside the card.
    """
    stage, name = record.stage, record.config.get("name") or run.name
    what = "Unconditional latent diffusion" if stage == STAGES[1] else "The first stage of latent diffusion"
    tag = "pipeline_tag: unconditional-image-generation\n" if stage == STAGES[1] else ""
    head = f"---\n{MARK}\nlibrary_name: ldm_lab\n{tag}tags: [latent-diffusion, ldm_lab]\n---\n"
    parts = [head + f"# {name}", f"{what} (Rombach et al. 2022), trained with ldm_lab {__version__}."]
    if pictured:
        parts.append(f"![{PICTURES[stage]}]({PICTURES[stage]}.png)")
    parts += ["## Figures", table(("figure", "value", "of"), figures(run, record, metrics))]
    kind = _kind(record.folder / "final")
    options = "" if find(record.config, "data.channels") in (None, 1, 3) else ', output_type="np"'  # Pillow has no more
    parts += ["## Use", f"```python\n{USE[stage].format(kind=kind, folder=name, options=options)}\n```"]
    made = [(key, value) for key in MADE_WITH if (value := find(record.config, key)) is not None]
    parts += ["## Made with", table(("setting", "value"), made), "All settings: `config.yaml` of the run."]
    return "\n\n".join(parts) + "\n"


def figures(run: RunRecord, record: StageRecord, metrics: dict[str, float]) -> list[tuple[str, str, str]]:
    """Rows (name, value, measured on) of the last validation and the evaluations. No times: equal runs, equal cards."""
    seen = f"{record.config.get('max_images', 0):,} training images"
    rows = [(name, f"{value:.4g}", f"held-out images, after {seen}") for name, value in sorted(metrics.items())]
    for evaluation in run.evaluations if record.stage == STAGES[1] else []:
        rows += [(name, _interval(metric), _source(evaluation)) for name, metric in sorted(evaluation.metrics.items())]
    return rows


def table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    """A Markdown table of plain-text cells."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)


def _cell(value: Any) -> str:  # noqa: ANN401
    plain = value if isinstance(value, str) else json.dumps(value)
    return plain.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def _interval(metric: dict[str, float]) -> str:
    value = f"{metric['value']:.4g}"
    return f"{value} ({metric['low']:.4g} to {metric['high']:.4g})" if {"low", "high"} <= metric.keys() else value


def _source(evaluation: Evaluation) -> str:
    content = evaluation.content
    sampling = content.get("sampling") or {}
    how = ", ".join(f"{key} {value}" for key, value in sampling.items())
    return f"{content.get('num_samples')} {content.get('kind')}" + (f" ({how})" if how else "")


def _kind(final: Path) -> str:
    """The class name of a first stage, from its config."""
    path = final / "config.json"
    return str(json.loads(path.read_text(encoding="utf-8")).get("_class_name")) if path.is_file() else "VQModel"

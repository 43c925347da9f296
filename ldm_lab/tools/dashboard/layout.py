"""Layout of a stage's dashboard: sections of panels, as plain data."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from ldm_lab.runs import metrics
from ldm_lab.runs.metrics import HOURS
from ldm_lab.runs.record import AXIS
from ldm_lab.runs.stages import AUTOENCODER, DIFFUSION

PICTURES = "pictures/"  # before the names of pictures


@dataclass(frozen=True)
class Panel:
    """A plot of curves, or a grid of pictures, step by run.

    Attributes:
        title: title of the panel.
        keys: metrics, or one picture with its prefix.
        x: metric on the x axis.
        logarithmic: whether the y axis is logarithmic.
    """

    title: str
    keys: tuple[str, ...]
    x: str = AXIS
    logarithmic: bool = False

    @property
    def is_picture(self) -> bool:
        """Whether the panel shows pictures."""
        return self.keys[0].startswith(PICTURES)


@dataclass(frozen=True)
class Section:
    """A titled group of panels."""

    name: str
    panels: tuple[Panel, ...]


def picture(title: str, name: str) -> Panel:
    """A panel of one kind of picture."""
    return Panel(title, (f"{PICTURES}{name}",))


# Pictures of the sections that have some; the first of a section.
PICTURED = {
    "data": (picture("What the network sees", "data"),),
    "samples": (
        picture("Averaged weights", "samples"),
        picture("Raw weights", "samples_raw"),
        picture("Denoising: what each step takes for clean", "denoising"),
        picture("Each sample before the training images nearest to it", "neighbours"),
    ),
    "reconstructions": (
        picture("Originals above their reconstructions", "reconstructions"),
        picture("How evenly the codes are used", "codebook"),
    ),
}
# Stage -> groups of metrics and pictures, in this order, with their titles; `hours` is quality over another axis.
SECTIONS = {
    DIFFUSION: {
        "quality": "Quality over images seen",
        "hours": "Quality over device hours",
        "samples": "Samples: the same seeds, step by run",
        "errors": "Where it errs",
        "training": "Training",
        "data": "Data",
        "machine": "Throughput and memory",
    },
    AUTOENCODER: {
        "quality": "Codec over images seen",
        "hours": "Codec over device hours",
        "reconstructions": "Reconstructions: the same images, step by run",
        "latents": "Latents",
        "game": "The discriminator's game",
        "training": "Training",
        "data": "Data",
        "machine": "Throughput and memory",
    },
}


def foreseen(stage: str) -> list[Section]:
    """The sections of a stage with all that any run may have."""
    return [Section(title, _panels(stage, group)) for group, title in SECTIONS[stage].items()]


def _panels(stage: str, group: str) -> tuple[Panel, ...]:
    """Pictures, then the metrics that are registered for a group; those of one title in one frame."""
    if group == "hours":
        return tuple(replace(panel, x=HOURS) for panel in _panels(stage, "quality"))
    frames: dict[str, Panel] = {}
    for metric in metrics.METRICS:
        if metric.group == group and stage in metric.stages and "*" not in metric.name:
            title = metric.panel or metric.name
            before = frames[title].keys if title in frames else metric.beside
            frames[title] = Panel(title, (*before, metric.name), logarithmic=metric.logarithmic)
    return (*PICTURED.get(group, ()), *frames.values())


def names(sections: Sequence[Section]) -> set[str]:
    """All metrics and pictures in these sections, and their x axes."""
    panels = [panel for section in sections for panel in section.panels]
    return {key for panel in panels for key in panel.keys} | {panel.x for panel in panels if not panel.is_picture}


def sections(stage: str, logged: Collection[str] | None = None) -> list[Section]:
    """The sections of a stage.

    Args:
        stage: "autoencoder" or "diffusion".
        logged: metrics and pictures, with prefix, of the compared runs: others are omitted, and unknown metrics get a
            section at the end. None: everything that a default run logs.

    Returns:
        Sections without empty panels and empty sections.
    """
    usual = foreseen(stage)
    if logged is None:
        occasional = {metric.name for metric in metrics.METRICS if metric.occasional}
        logged = names(usual) - occasional
    unforeseen = sorted(set(logged) - names(usual) - {AXIS})
    more = Section("More", tuple(Panel(name, (name,)) for name in unforeseen))
    found = []
    for section in (*usual, more):
        panels = [replace(panel, keys=tuple(key for key in panel.keys if key in logged)) for panel in section.panels]
        if panels := tuple(panel for panel in panels if panel.keys and (panel.is_picture or known(panel.x, logged))):
            found.append(replace(section, panels=panels))
    return found


def known(axis: str, logged: Collection[str]) -> bool:
    """Whether the runs have logged the metric of an x axis."""
    return axis == AXIS or axis in logged

"""Layout of a stage's dashboard: sections of panels, as plain data."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from ldm_lab.runs.record import AXIS

HOURS = "perf/device_hours"
PICTURES = "pictures/"  # prefix of picture names
TENTHS = tuple(f"val/loss_t{part}" for part in range(10))
EVALUATIONS = (
    "fid", "kid", "fd_dinov2", "precision", "recall", "density", "coverage", "near_copies", "rfid", "psnr", "ssim",
    "lpips",
)  # fmt: skip


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


def curve(title: str, *keys: str, x: str = AXIS, logarithmic: bool = False) -> Panel:
    """A panel of metrics in one plot."""
    return Panel(title, keys, x, logarithmic)


def picture(title: str, name: str) -> Panel:
    """A panel of one kind of picture."""
    return Panel(title, (f"{PICTURES}{name}",))


def each(prefix: str, *names: str, x: str = AXIS) -> tuple[Panel, ...]:
    """A panel for each metric."""
    return tuple(curve(f"{prefix}{name}", f"{prefix}{name}", x=x) for name in names)


QUALITY = {
    "diffusion": (
        curve("Loss on held-out images", "val/loss"),
        curve("Held-out and training images: apart, it memorises", "val/loss", "val/loss_on_training_images"),
        *each("eval/", *EVALUATIONS),
    ),
    "autoencoder": (*each("val/", "psnr", "ssim", "loss"), *each("eval/", "rfid", "psnr", "ssim", "lpips")),
}
MACHINE = Section(
    "Throughput and memory",
    (
        curve("Images per second, all devices", "perf/images_per_second"),
        curve("Memory of a device at most, GB", "perf/memory_gb"),
        curve("Device hours", HOURS),
    ),
)
DATA = Section(
    "Data", (picture("What the network sees", "data"), curve("Files that were passed over", "data/skipped_files"))
)
SECTIONS = {
    "diffusion": (
        Section("Quality over images seen", QUALITY["diffusion"]),
        Section("Quality over device hours", tuple(replace(panel, x=HOURS) for panel in QUALITY["diffusion"])),
        Section(
            "Samples: the same seeds, step by run",
            (
                picture("Averaged weights", "samples"),
                picture("Raw weights", "samples_raw"),
                picture("Denoising: what each step takes for clean", "denoising"),
                picture("Each sample before the training images nearest to it", "neighbours"),
            ),
        ),
        Section(
            "Where it errs",
            (
                curve("Loss by tenths of the timesteps: t0 has the least noise", *TENTHS),
                curve("Mean of the scaled latents: 0", "val/latent_mean"),
                curve("Their standard deviation: 1", "val/latent_std"),
            ),
        ),
        Section(
            "Training",
            (
                curve("Loss", "train/loss"),
                curve("Norm of the gradient, before clipping", "train/grad_norm", logarithmic=True),
                curve("Learning rate", "train/lr"),
                curve("Steps left out", "train/skipped_steps"),
            ),
        ),
        DATA,
        MACHINE,
    ),
    "autoencoder": (
        Section("Codec over images seen", QUALITY["autoencoder"]),
        Section("Codec over device hours", tuple(replace(panel, x=HOURS) for panel in QUALITY["autoencoder"])),
        Section(
            "Reconstructions: the same images, step by run",
            (
                picture("Originals above their reconstructions", "reconstructions"),
                picture("How evenly the codes are used", "codebook"),
            ),
        ),
        Section(
            "Latents",
            (
                *each("codebook/", "perplexity", "used_fraction"),
                curve("Collapsed: 1", "collapse/codebook", "collapse/discriminator"),
                *each("val/", "latent_std", "kl", "posterior_std"),
            ),
        ),
        Section(
            "The discriminator's game",
            (
                curve("Loss of the discriminator", "disc/discriminator"),
                curve("Its logits", "disc/logits_real", "disc/logits_fake"),
                curve("Loss of the generator", "disc/generator"),
                curve("Its weight", "disc/d_weight", "disc/factor", logarithmic=True),
                curve("Norm of the discriminator's gradient", "disc/grad_norm", logarithmic=True),
            ),
        ),
        Section(
            "Training",
            (
                *each("train/", "loss", "nll", "rec", "perceptual", "codebook", "kl"),
                curve("Norm of the gradient, before clipping", "train/grad_norm", logarithmic=True),
                curve("Learning rate", "train/lr"),
                curve("Steps left out", "train/skipped_steps"),
            ),
        ),
        DATA,
        MACHINE,
    ),
}
OCCASIONAL = ("eval/", "train/skipped_steps", "data/skipped_files")  # logged only on request


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
    if logged is None:
        logged = {name for name in names(SECTIONS[stage]) if not name.startswith(OCCASIONAL)}
    unforeseen = sorted(set(logged) - names(SECTIONS[stage]) - {AXIS})
    more = Section("More", tuple(curve(name, name) for name in unforeseen))
    found = []
    for section in (*SECTIONS[stage], more):
        panels = [replace(panel, keys=tuple(key for key in panel.keys if key in logged)) for panel in section.panels]
        if panels := tuple(panel for panel in panels if panel.keys and (panel.is_picture or known(panel.x, logged))):
            found.append(replace(section, panels=panels))
    return found


def known(axis: str, logged: Collection[str]) -> bool:
    """Whether the runs have logged the metric of an x axis."""
    return axis == AXIS or axis in logged

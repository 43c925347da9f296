"""The metrics of `metrics.csv` and of evaluations, each registered once: report and dashboard read them from here.

A metric that nobody has registered is shown too: last, and without a word on which value is better.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

from ldm_lab.runs.stages import AUTOENCODER, DIFFUSION, STAGES

HOURS = "perf/device_hours"


@dataclass(frozen=True)
class Metric:
    """What there is to say of a metric.

    Attributes:
        name: with its prefix; `*` stands for anything.
        says: what it is, in a line.
        group: the section of the dashboard that it is in; "": of one of its own, at the end.
        stages: in which it is logged.
        better: "lower" or "higher", or in words a value that is best; None: none is.
        unit: "dB", or "" for numbers that compare by their ratio.
        main: whether runs are judged by it.
        panel: title of its frame, which it shares with others of the same title; None: its name.
        beside: metrics that are drawn in its frame a second time.
        logarithmic: whether its axis is.
        occasional: whether it is there only where it was asked for.
    """

    name: str
    says: str
    group: str = ""
    stages: tuple[str, ...] = STAGES
    better: str | None = None
    unit: str = ""
    main: bool = False
    panel: str | None = None
    beside: tuple[str, ...] = ()
    logarithmic: bool = False
    occasional: bool = False


# In this order they are shown: what tells most is first.
METRICS: list[Metric] = []


def register(*metrics: Metric) -> None:
    """Add metrics."""
    METRICS.extend(metrics)


def find(name: str) -> Metric | None:
    """What is registered for a name; None: nothing."""
    return next((metric for metric in METRICS if fnmatchcase(name, metric.name)), None)


def direction(name: str) -> str | None:
    """Whether "lower" or "higher" is better; None where neither is."""
    metric = find(name)
    return metric.better if metric and metric.better in ("lower", "higher") else None


def rank(name: str) -> tuple[int, str]:
    """The place of a metric among others."""
    metric = find(name)
    return METRICS.index(metric) if metric else len(METRICS), name


def main(stage: str, evaluated: bool) -> list[str]:
    """The metrics that runs are judged by, of evaluations or of a stage's own validations."""
    mine = [metric.name for metric in METRICS if metric.main and stage in metric.stages]
    return [name for name in mine if name.startswith("eval/") is evaluated]


_A, _D = (AUTOENCODER,), (DIFFUSION,)
_MEMORISES = "Held-out and training images: apart, it memorises"
_QUALITY = (
    Metric("val/loss", "mean loss on held-out images", "quality", _D, "lower", main=True,
           panel="Loss on held-out images"),
    Metric("val/loss_on_training_images", "the same on as many training images", "quality", _D, "lower",
           panel=_MEMORISES, beside=("val/loss",)),
    Metric("val/psnr", "peak signal-to-noise ratio of reconstructions", "quality", _A, "higher", "dB", main=True),
    Metric("val/ssim", "structural similarity of reconstructions", "quality", _A, "higher", main=True),
    Metric("val/loss", "mean loss on held-out images", "quality", _A, "lower", main=True),
)  # fmt: skip


def _evaluated(name: str, says: str, better: str, stages: tuple[str, ...] = _D, **more: object) -> Metric:
    return Metric(f"eval/{name}", says, "quality", stages, better, occasional=True, **more)  # type: ignore[arg-type]


_EVALUATIONS = (
    _evaluated("fid", "Fréchet distance of Inception features to real images", "lower", main=True),
    _evaluated("fd_dinov2", "the same of DINOv2 features", "lower", main=True),
    _evaluated("fd_*", "the same of a network trained on the data set", "lower"),
    _evaluated("kid", "kernel distance of features to real images", "lower", main=True),
    _evaluated("precision", "share of samples that lie among real images", "higher"),
    _evaluated("recall", "share of real images that lie among samples", "higher"),
    _evaluated("density", "how many real images samples lie among", "higher"),
    _evaluated("coverage", "share of real images with a sample near them", "higher"),
    _evaluated("rfid", "FID of reconstructions", "lower", STAGES),
    _evaluated("lpips", "perceptual distance of reconstructions", "lower", STAGES),
    _evaluated("near_copies", "share of samples nearer to a training image than 1 % of held-out ones", "about 0.01"),
    Metric("eval/neighbour_distance", "distance to the nearest training image, over that of held-out images",
           stages=_D, better="about 1", occasional=True),
    _evaluated("psnr", "peak signal-to-noise ratio of reconstructions", "higher", STAGES, unit="dB"),
    _evaluated("ssim", "structural similarity of reconstructions", "higher", STAGES),
)  # fmt: skip
TENTHS = tuple(f"val/loss_t{part}" for part in range(10))
_ERRORS = (
    *(Metric(name, "mean loss in a tenth of the timesteps", "errors", _D, "lower",
             panel="Loss by tenths of the timesteps: t0 has the least noise") for name in TENTHS),
    Metric("val/latent_mean", "of the scaled latents", "errors", _D, panel="Mean of the scaled latents: 0"),
    Metric("val/latent_std", "of the scaled latents", "errors", _D, panel="Their standard deviation: 1"),
)  # fmt: skip
_LATENTS = (
    Metric("codebook/perplexity", "codes in use, as if all were used alike", "latents", _A, "higher"),
    Metric("codebook/used_fraction", "share of the codes that are used", "latents", _A, "higher"),
    Metric("collapse/codebook", "1: it has collapsed", "latents", _A, panel="Collapsed: 1"),
    Metric("collapse/discriminator", "1: it has collapsed", "latents", _A, panel="Collapsed: 1"),
    Metric("val/latent_std", "standard deviation of the latents", "latents", _A),
    Metric("val/kl", "divergence of the posterior from the standard normal", "latents", _A),
    Metric("val/posterior_std", "mean standard deviation of the posterior", "latents", _A),
)
_GAME = (
    Metric("disc/discriminator", "its hinge loss", "game", _A, panel="Loss of the discriminator"),
    Metric("disc/logits_real", "mean for images", "game", _A, panel="Its logits"),
    Metric("disc/logits_fake", "mean for reconstructions", "game", _A, panel="Its logits"),
    Metric("disc/generator", "the generator's side of the loss", "game", _A, panel="Loss of the generator"),
    Metric("disc/d_weight", "adaptive weight", "game", _A, panel="Its weight", logarithmic=True),
    Metric("disc/factor", "how far the term has come in", "game", _A, panel="Its weight", logarithmic=True),
    Metric("disc/grad_norm", "before clipping", "game", _A, panel="Norm of the discriminator's gradient",
           logarithmic=True),
)  # fmt: skip
_TRAINING = (
    Metric("train/loss", "of the last step", "training", _D, panel="Loss"),
    *(Metric(f"train/{name}", "a term of the loss of the last step", "training", _A)
      for name in ("loss", "nll", "rec", "perceptual", "codebook", "kl")),
    Metric("train/grad_norm", "of the last step", "training", panel="Norm of the gradient, before clipping",
           logarithmic=True),
    Metric("train/lr", "of the last step", "training", panel="Learning rate"),
    Metric("train/skipped_steps", "where a loss or gradient was not finite", "training", panel="Steps left out",
           occasional=True),
)  # fmt: skip
_MACHINE = (
    Metric("data/skipped_files", "that could not be decoded", "data", panel="Files that were passed over",
           occasional=True),
    Metric("perf/images_per_second", "over all devices", "machine", panel="Images per second, all devices"),
    Metric("perf/memory_gb", "since the last row", "machine", panel="Memory of a device at most, GB"),
    Metric(HOURS, "hours times devices since the stage began", "machine", panel="Device hours"),
)  # fmt: skip
register(*_QUALITY, *_EVALUATIONS, *_ERRORS, *_LATENTS, *_GAME, *_TRAINING, *_MACHINE)

"""Describes the metrics of `metrics.csv` and of evaluations, for the report and the dashboard.

Both also show metrics that nobody has registered: last, and without saying which values are better.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

from ldm_lab.runs.stages import AUTOENCODER, DIFFUSION, STAGES

HOURS = "perf/device_hours"


@dataclass(frozen=True)
class Metric:
    """Description of a metric.

    Attributes:
        name: name with prefix; `*` matches anything.
        says: definition of the metric, in a line.
        group: its section of the dashboard; "": a section of its own, at the end.
        stages: stages that log the metric.
        better: "lower", "higher", or the best value in words; None: no value is better.
        unit: "dB", or "" for numbers that compare by their ratio.
        main: whether the metric decides which run is better.
        panel: title of its plot, which metrics with the same title share; None: the metric's name.
        beside: metrics of other plots that this plot repeats.
        logarithmic: whether the plot's axis is logarithmic.
        occasional: whether the metric is logged only on request.
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


# In the order of display: the most telling metrics first.
METRICS: list[Metric] = []


def register(*metrics: Metric) -> None:
    """Register metrics."""
    METRICS.extend(metrics)


def find(name: str) -> Metric | None:
    """The registered metric of this name; None if there is none."""
    return next((metric for metric in METRICS if fnmatchcase(name, metric.name)), None)


def direction(name: str) -> str | None:
    """Whether "lower" or "higher" values are better; None if neither are."""
    metric = find(name)
    return metric.better if metric and metric.better in ("lower", "higher") else None


def rank(name: str) -> tuple[int, str]:
    """Sort key for the order of display."""
    metric = find(name)
    return METRICS.index(metric) if metric else len(METRICS), name


def main(stage: str, evaluated: bool) -> list[str]:
    """Names of the main metrics of a stage, either of evaluations or of its own validations."""
    mine = [metric.name for metric in METRICS if metric.main and stage in metric.stages]
    return [name for name in mine if name.startswith("eval/") is evaluated]


_A, _D = (AUTOENCODER,), (DIFFUSION,)
_MEMORISES = "Loss on held-out and training images: a gap means memorising"
_QUALITY = (
    Metric("val/loss", "mean loss on held-out images", "quality", _D, "lower", main=True,
           panel="Loss on held-out images"),
    Metric("val/loss_on_training_images", "mean loss on as many training images", "quality", _D, "lower",
           panel=_MEMORISES, beside=("val/loss",)),
    Metric("val/psnr", "peak signal-to-noise ratio of reconstructions", "quality", _A, "higher", "dB", main=True),
    Metric("val/psnr_chroma", "peak signal-to-noise ratio of the colours, Cb and Cr, of reconstructions", "quality", _A,
           "higher", "dB"),
    Metric("val/hues_kept", "share of the colourful pixels whose hue reconstructions keep", "quality", _A, "higher"),
    Metric("val/ssim", "structural similarity of reconstructions", "quality", _A, "higher", main=True),
    Metric("val/loss", "mean loss on held-out images", "quality", _A, "lower", main=True),
)  # fmt: skip


def _evaluated(name: str, says: str, better: str, stages: tuple[str, ...] = _D, **more: object) -> Metric:
    return Metric(f"eval/{name}", says, "quality", stages, better, occasional=True, **more)  # type: ignore[arg-type]


_EVALUATIONS = (
    _evaluated("fid", "Fréchet distance of Inception features to real images", "lower", main=True),
    _evaluated("fd_dinov2", "Fréchet distance of DINOv2 features to real images", "lower", main=True),
    _evaluated("fd_*", "Fréchet distance of features of a network trained on the data set", "lower"),
    _evaluated("kid", "kernel distance of features to real images", "lower", main=True),
    _evaluated("precision", "share of samples that lie among real images", "higher"),
    _evaluated("recall", "share of real images that lie among samples", "higher"),
    _evaluated("density", "mean number of real neighbourhoods that hold a sample, divided by k", "higher"),
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
    Metric("val/latent_mean", "mean of the scaled latents", "errors", _D,
           panel="Mean of the scaled latents: ideally 0"),
    Metric("val/latent_std", "standard deviation of the scaled latents", "errors", _D,
           panel="Standard deviation of the scaled latents: ideally 1"),
)  # fmt: skip
_LATENTS = (
    Metric("codebook/perplexity", "effective number of codes in use", "latents", _A, "higher"),
    Metric("codebook/used_fraction", "share of the codes in use", "latents", _A, "higher"),
    Metric("collapse/codebook", "1 while the codebook is collapsed", "latents", _A, panel="Collapsed: 1"),
    Metric("collapse/discriminator", "1 while the discriminator is collapsed", "latents", _A, panel="Collapsed: 1"),
    Metric("val/latent_std", "standard deviation of the latents", "latents", _A),
    Metric("val/latent_high_frequency", "share of the latents' energy in the upper half of the frequencies", "latents",
           _A),
    Metric("val/kl", "divergence of the posterior from the standard normal", "latents", _A),
    Metric("val/posterior_std", "mean standard deviation of the posterior", "latents", _A),
)  # fmt: skip
_GAME = (
    Metric("disc/discriminator", "hinge loss of the discriminator", "game", _A, panel="Loss of the discriminator"),
    Metric("disc/logits_real", "mean logit of images", "game", _A, panel="Logits of the discriminator"),
    Metric("disc/logits_fake", "mean logit of reconstructions", "game", _A, panel="Logits of the discriminator"),
    Metric("disc/generator", "adversarial loss of the autoencoder", "game", _A, panel="Loss of the generator"),
    Metric("disc/d_weight", "adaptive weight of the adversarial loss", "game", _A,
           panel="Weight of the adversarial loss", logarithmic=True),
    Metric("disc/factor", "factor that fades the adversarial loss in", "game", _A,
           panel="Weight of the adversarial loss", logarithmic=True),
    Metric("disc/grad_norm", "gradient norm before clipping", "game", _A, panel="Norm of the discriminator's gradient",
           logarithmic=True),
)  # fmt: skip
_TRAINING = (
    Metric("train/loss", "loss of the last step", "training", _D, panel="Loss"),
    *(Metric(f"train/{name}", "a term of the loss of the last step", "training", _A)
      for name in ("loss", "nll", "rec", "perceptual", "codebook", "kl")),
    Metric("train/grad_norm", "gradient norm of the last step", "training",
           panel="Norm of the gradient, before clipping", logarithmic=True),
    Metric("train/lr", "learning rate of the last step", "training", panel="Learning rate"),
    Metric("train/skipped_steps", "steps whose loss or gradient was not finite", "training", panel="Skipped steps",
           occasional=True),
)  # fmt: skip
_MACHINE = (
    Metric("data/skipped_files", "files that could not be decoded", "data", panel="Skipped files", occasional=True),
    Metric("perf/images_per_second", "training speed of all devices", "machine",
           panel="Images per second, all devices"),
    Metric("perf/memory_gb", "peak memory since the last row", "machine", panel="Peak memory of a device, GB"),
    Metric(HOURS, "hours times devices since the stage began", "machine", panel="Device hours"),
)  # fmt: skip
register(*_QUALITY, *_EVALUATIONS, *_ERRORS, *_LATENTS, *_GAME, *_TRAINING, *_MACHINE)

"""Measure how good samples, images or an autoencoder are: FID and its kin, with intervals, into eval/*.json.

SRC is a model (anything that sample.py takes: its samples are drawn, or found where sample.py keeps them), a folder or
archive of images, or an .npz. It is compared with the training images of its run, or with --data. What the figures
mean, and what makes them wrong: docs/evaluation.md.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm_lab.utils.cache_folder import default_folder, local
from ldm_lab.utils.errors import UserError

if TYPE_CHECKING:
    from ldm_lab.tools.evaluate.evaluate import Request

FEATURES = {
    "own": "a small network trained here on the data set itself",
    "inception": "Inception-v3: FID",
    "dinov2": "DINOv2 ViT-L/14: FD-DINOv2",
}


def parser() -> argparse.ArgumentParser:
    """The tool's argument parser."""
    text = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m ldm_lab evaluate", description=__doc__, formatter_class=text)
    add = parser.add_argument
    add("source", metavar="SRC", help="a run, its snapshot (runs/x@2M), a model, a folder of images, or an .npz")
    add("--data", help="a folder or archive of real images, or statistics (.npz); default: the run's training images")
    add("--features", choices=FEATURES, default="own", help="; ".join(f"{k}: {v}" for k, v in FEATURES.items()))
    add("--weights", metavar="FILE", help="of inception or dinov2; without it, torch's hub is asked")
    add("--lpips-weights", metavar="FILE", help="with --autoencoder: torchvision's vgg16-397923af.pth")
    add("--num-samples", type=int, default=2048, help="drawn from a model (default: %(default)s)")
    add("--sampler", default="ddim", help="a name of configs/sampler/ (default: %(default)s)")
    add("--steps", type=int, default=50, help="evaluations of the UNet for a sample (default: %(default)s)")
    add("--eta", type=float, default=0.0, help="of ddim (default: %(default)s)")
    add("--ema", type=float, metavar="LENGTH", help="of the weights' average, with model.power_ema (docs/ema.md)")
    add("--guide", help="guide the samples by this smaller or less trained model, e.g. SRC@500k; with --guidance")
    add("--guidance", type=float, default=1.0, metavar="W", help="scale of the guide; 1: without (default: 1)")
    add("--guidance-interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="noise levels where the guide acts")
    add("--seed", type=int, default=0, help="sample i is drawn from (seed, i) (default: %(default)s)")
    add("--batch-size", type=int, default=16, help="samples at a time on each device (default: %(default)s)")
    add("--autoencoder", action="store_true", help="judge the first stage of SRC alone, on held-out images")
    add("--snapshots", action="store_true", help="judge every snapshot of the run SRC, and name the best")
    add("--export-best", type=Path, metavar="FOLDER", help="with --snapshots: write the best there")
    add("--image-size", type=int, nargs="+", metavar="N", help="resize the images of SRC: a side, or height and width")
    add("--channels", type=int, default=3, metavar="C", help="of the files of SRC, without a manifest (default: 3)")
    add("--value-range", type=float, nargs=2, metavar=("LOW", "HIGH"), help="of their values (default: 8 bits)")
    add("--max-pixels", type=int, metavar="N", help="of an image file, against what claims to be enormous")
    add("--num-reference", type=int, default=50_000, help="real images at most, spread evenly (default: %(default)s)")
    add("--save-reference", type=Path, metavar="FILE.npz", help="keep the statistics of the real images there")
    add("--bootstrap", type=int, default=200, help="replicates for the intervals; 0: none (default: %(default)s)")
    add("--output", type=Path, metavar="FOLDER", help="for the result (default: eval/ of the run)")
    add("--devices", type=int, default=1, help="how many (default: %(default)s)")
    add("--nodes", type=int, default=1, help="machines; start the command on each (default: %(default)s)")
    add("--accelerator", default="auto", help="cpu, gpu, or what there is (default: %(default)s)")
    add("--num-workers", type=int, default=0, help="processes that load images on each device (default: %(default)s)")
    add("--cache", type=local, help="paths.cache: drawn images, extractors, features (default: that of train.py)")
    add("--plugins", nargs="*", default=[], help="packages whose classes the model or its data may name")
    return parser


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse and check the flags. Raises `UserError`, which names the flag."""
    options = parser().parse_args(argv)
    lowest = {"num_samples": 2, "steps": 1, "seed": 0, "batch_size": 1, "num_reference": 2, "bootstrap": 0}
    for name, low in {**lowest, "channels": 1, "devices": 1, "nodes": 1, "num_workers": 0, "max_pixels": 1}.items():
        if (value := getattr(options, name)) is not None and value < low:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least {low}")
    sides = options.image_size
    if sides and (len(sides) > 2 or min(sides) < 1):
        raise UserError(f"--image-size {' '.join(map(str, sides))}: give one or two positive numbers of pixels")
    options.image_size = sides and (sides[0], sides[-1])
    low, high = options.value_range = tuple(options.value_range or (0.0, 255.0))
    if not -math.inf < low < high < math.inf:
        raise UserError(f"--value-range {low:g} {high:g}: must be two rising numbers")
    _check_guidance(options)
    if options.autoencoder and options.snapshots:
        raise UserError("--autoencoder and --snapshots exclude each other: a run has one first stage")
    if options.ema is not None and (options.autoencoder or options.snapshots):
        raise UserError(f"--ema {options.ema} is for samples of one time: leave --autoencoder and --snapshots out")
    if options.export_best and not options.snapshots:
        raise UserError("--export-best is for --snapshots")
    if options.save_reference and options.autoencoder:
        raise UserError("--save-reference is for samples and images: --autoencoder keeps no statistics")
    if options.save_reference and options.save_reference.exists():
        raise UserError(f"--save-reference {options.save_reference}: is there already; name a new file")
    return options


def _check_guidance(options: argparse.Namespace) -> None:
    scale, (low, high) = options.guidance, options.guidance_interval or (0, 1)
    if not 0 <= scale < math.inf:
        raise UserError(f"--guidance {scale:g}: must be a number, at least 0; 1 is without guidance")
    if scale != 1 and not options.guide:
        raise UserError(f"--guidance {scale:g}: needs --guide, a smaller or less trained model")
    if not 0 <= low < high < math.inf:
        raise UserError(f"--guidance-interval {low:g} {high:g}: must be two rising noise levels from 0 on")


def main(argv: list[str]) -> None:
    """Evaluate, print and write. Raises `UserError` for invalid flags."""
    options = parse(argv)

    from ldm_lab.tools.evaluate import evaluate as tools

    request = requested(options)
    if options.autoencoder:
        tools.evaluate_autoencoder(request)
    elif options.snapshots:
        tools.evaluate_snapshots(request, options.export_best)
    else:
        tools.evaluate(request)


def requested(options: argparse.Namespace) -> Request:
    """The request of checked flags."""
    from ldm_lab.tools.evaluate.drawn import Sampling
    from ldm_lab.tools.evaluate.evaluate import Request

    options.sampling = Sampling(**_taken(options, Sampling))
    options.cache_dir, options.data_cache = options.cache or default_folder(), options.cache and str(options.cache)
    return Request(**_taken(options, Request))


def _taken(options: argparse.Namespace, kind: type) -> dict[str, Any]:
    """The options that a dataclass has fields for."""
    return {field.name: getattr(options, field.name) for field in fields(kind)}

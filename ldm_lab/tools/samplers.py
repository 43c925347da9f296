"""Measure how far each sampler is from the exact solution, by number of network evaluations.

Without noise in its steps a sampler solves the ODE of diffusion: from the same starting noise all come to the same
latents, given enough steps, and the distance to those is the error of the sampler alone. Samplers with noise (ddpm,
DDIM with eta above 0, the SDE) come to another image with every number of steps: they have no such distance.

The solution is DPM-Solver++ 2M at every timestep that the network knows. DDIM with as many steps is of first order: its
own error would count against the others. All end at a clean sample here, whatever noise level the model's own ends at.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm_lab.diffusion.flow import is_flow
from ldm_lab.diffusion.samplers import choose
from ldm_lab.diffusion.scheduler import Scheduler
from ldm_lab.pipeline import LDMPipeline
from ldm_lab.utils import float32
from ldm_lab.utils.errors import UserError
from ldm_lab.utils.randomness import generators
from ldm_lab.utils.writing import replacing

# Name -> sampler, and the settings that differ from those of `sample.py`.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("ddim", {}),
    "ddim_trailing": ("ddim", {"timestep_spacing": "trailing"}),
    "ddim_linspace": ("ddim", {"timestep_spacing": "linspace"}),
    "dpm_solver": ("dpm_solver", {"solver_order": 2, "use_lu_lambdas": True}),
    "dpm_solver_3m": ("dpm_solver", {"solver_order": 3, "use_lu_lambdas": True}),
    "dpm_solver_linspace": ("dpm_solver", {"timestep_spacing": "linspace", "use_lu_lambdas": False}),
}
REFERENCE = "dpm_solver"
# Settings that make all samplers solve the same equation to the same end.
SHARED: dict[str, dict[str, Any]] = {
    "ddim": {"set_alpha_to_one": True},
    "dpm_solver": {"final_sigmas_type": "zero", "algorithm_type": "dpmsolver++"},
}


class Row(NamedTuple):
    """One measurement: relative L2 distances, ‖x - solution‖ / ‖solution‖.

    Attributes:
        sampler: one of `VARIANTS`.
        evaluations: network evaluations per image.
        distance: distance of the latents of all images together.
        mean_of_images: mean of the distances of single images' latents.
    """

    sampler: str
    evaluations: int
    distance: float
    mean_of_images: float


def main(argv: list[str]) -> None:
    """Print a row for each sampler and number of evaluations. Raises `UserError` for invalid flags."""
    options = parse(argv)
    pipe = LDMPipeline.from_pretrained(options.source)
    if is_flow(type(pipe.scheduler)):
        raise UserError(f"{options.source}: a model of flow matching; this tool compares samplers of diffusion models")
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    reference = options.reference or len(pipe.scheduler)
    print(f"{options.seeds} images; the solution: DPM-Solver++ 2M with {reference} steps")
    rows = []
    with float32.exact():  # TF32's error exceeds that of the best samplers
        for row in measure(pipe, options.sampler, options.steps, options.seeds, reference):
            if not rows:
                print("sampler              evaluations  distance  mean of images")
            print("{:19}  {:11}  {:8.4f}  {:14.4f}".format(*row), flush=True)
            rows.append(row)
    if options.output:
        with replacing(options.output) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([Row._fields, *rows])


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse and check the flags. Raises `UserError`, which names the flag."""
    text = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m ldm_lab samplers", description=__doc__, formatter_class=text)
    parser.add_argument("source", metavar="SRC", help="a run, finished or not, a pipeline folder or a checkpoint")
    parser.add_argument("--seeds", type=int, default=8, help="how many images, those of sample.py seed=0 (default: 8)")
    parser.add_argument("--steps", default="5,10,20,50,100,200", help="numbers of evaluations (default: %(default)s)")
    parser.add_argument("--sampler", default=",".join(VARIANTS), help="default: %(default)s")
    parser.add_argument("--reference", type=int, help="steps of the solution (default: all timesteps of the model)")
    parser.add_argument("--output", type=Path, metavar="FILE.csv", help="write the table there, too")
    options = parser.parse_args(argv)
    numbers = options.steps.split(",")
    if not all(number.isdecimal() and int(number) for number in numbers):
        raise UserError(f"--steps {options.steps}: must be numbers of evaluations, such as 5,10,20")
    options.steps, options.sampler = [int(number) for number in numbers], options.sampler.split(",")
    for name in options.sampler:
        if name not in VARIANTS:
            noisy = ": its steps draw noise, so that it has no one solution" if name == "ddpm" else ""
            raise UserError(f"--sampler {name}{noisy}; there are {', '.join(VARIANTS)}")
    for flag in ("seeds", "reference"):
        if (value := getattr(options, flag)) is not None and value < 1:
            raise UserError(f"--{flag} {value}: must be at least 1")
    if options.output and (options.output.exists() or not options.output.parent.is_dir()):
        raise UserError(f"--output {options.output}: must be a new file in a folder that is there")
    return options


def measure(pipe: LDMPipeline, samplers: list[str], steps: list[int], seeds: int, reference: int) -> Iterator[Row]:
    """Yield the distances, sampler by sampler.

    Args:
        pipe: the model.
        samplers: names in `VARIANTS`.
        steps: numbers of evaluations.
        seeds: number of images; image i starts from the same noise as in `sample.py` with seed 0.
        reference: evaluations of the solution.

    Raises:
        UserError: a sampler does not support this number of steps; raised before sampling.
    """
    exact, *schedulers = [variant(pipe.scheduler, name) for name in (REFERENCE, *samplers)]
    exact.set_timesteps(reference)
    for scheduler in schedulers:
        scheduler.set_timesteps(max(steps))
    solution = latents(pipe, exact, reference, seeds)
    for name, scheduler in zip(samplers, schedulers, strict=True):
        for count in steps:
            off = latents(pipe, scheduler, count, seeds) - solution
            each = off.flatten(1).norm(dim=1) / solution.flatten(1).norm(dim=1)  # (B, C, h, w) -> (B,)
            yield Row(name, count, float(off.norm() / solution.norm()), float(each.mean()))


def variant(own: Scheduler, name: str) -> Scheduler:
    """A sampler of `VARIANTS` for the model with the scheduler `own`; it ends at a clean sample."""
    kind, settings = VARIANTS[name]
    scheduler = choose(kind, own)
    return type(scheduler).from_config(scheduler.config, **SHARED[kind], **settings)


def latents(pipe: LDMPipeline, scheduler: Scheduler, steps: int, seeds: int) -> Tensor:
    """The pipeline's latents with a sampler: `(seeds, C, h, w)`, scaled, float64, on the CPU."""
    pipe = LDMPipeline(pipe.vqvae, pipe.unet, scheduler)
    pipe.set_progress_bar_config(disable=True)
    return (
        pipe(seeds, generators(0, range(seeds)), num_inference_steps=steps, output_type="latent").images.cpu().double()
    )

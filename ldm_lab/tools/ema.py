"""Choose the length of the weights' average after training, from a run's snapshots: list, evaluate, write.

The run needs model.power_ema=[0.05,0.1] and snapshots=INTERVAL. Lengths are sigma_rel of Karras et al. 2024, arXiv
2312.02696; the residual is the relative L2 error of the profile. What to choose: docs/ema.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ldm_lab.checkpoints import averages, locate
from ldm_lab.checkpoints.locate import State
from ldm_lab.pipeline import LDMPipeline
from ldm_lab.sampling import averaged
from ldm_lab.tools.evaluate import command
from ldm_lab.utils.errors import UserError
from ldm_lab.utils.power_profiles import Profile
from ldm_lab.utils.terminal import is_first_process

if TYPE_CHECKING:
    from ldm_lab.tools.evaluate.evaluate import Request

OTHERS = ("ema", "autoencoder", "snapshots")  # flags of `evaluate` that do not go with lengths


def main(argv: list[str]) -> None:
    """List the lengths, then write or evaluate them. Raises `UserError` for a length that the snapshots do not give."""
    options = parse(argv)
    source = f"{options.run}@{options.at}" if options.at else options.run
    request = evaluation(source, options)
    key = "--length {}".format
    state = averages.snapshot_of(locate.find(source), key(options.length[0]))
    found = averages.stored(state)
    wanted = {length: Profile(length, state.images_seen) for length in options.length}
    residuals = {length: averages.fit(found, profile, key(length)).residual for length, profile in wanted.items()}
    if is_first_process():
        show(state, residuals, {})
    if options.output and is_first_process():
        given = averaged.given(state, options.length[0], "--length", options.plugins)
        pipe = LDMPipeline.from_file_or_folder(state.path, given=given, plugins=options.plugins)
        pipe.save_pretrained(options.output)
        print(f"written to {options.output}")
    if request:
        evaluate(request, state, residuals)


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse and check the flags. Raises `UserError`, which names the flag."""
    text = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m ldm_lab ema", description=__doc__, formatter_class=text)
    add = parser.add_argument
    add("run", metavar="RUN", help="a run, finished or not")
    add("--length", type=float, nargs="+", required=True, help="lengths between 0 and 0.289, e.g. 0.03 0.07 0.12")
    add("--at", metavar="IMAGES", help="the end of the averages: a snapshot, e.g. 2M (default: the newest)")
    add("--output", type=Path, metavar="FOLDER", help="with a single --length: write the pipeline there")
    add("--plugins", nargs="*", default=[], help="packages whose classes the model may name")
    add("--evaluate", nargs=argparse.REMAINDER, metavar="FLAG", help="comes last: flags of python -m ldm_lab evaluate")
    options = parser.parse_args(argv)
    target = options.output
    if target and len(options.length) > 1:
        raise UserError(f"--output {target} is for a single --length, and {len(options.length)} are given")
    if target and target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"--output {target}: must not exist, or be an empty folder")
    return options


def evaluation(source: str, options: argparse.Namespace) -> Request | None:
    """The request of `--evaluate`; `None` without this flag. Raises `UserError` for a flag of other evaluations."""
    if options.evaluate is None:
        return None
    flags = command.parse([source, "--plugins", *options.plugins, *options.evaluate])
    if given := next((name for name in OTHERS if getattr(flags, name)), None):
        raise UserError(f"--evaluate --{given}: not for the lengths of an average, leave it out")
    return command.requested(flags)


def evaluate(request: Request, state: State, residuals: Mapping[float, float]) -> None:
    """Evaluate samples of each length, and print a table of their Fréchet distances."""
    from ldm_lab.tools.evaluate.evaluate import evaluate_state
    from ldm_lab.training.watch import watched

    trainer, evaluator, distances = request.trainer(), None, {}
    with watched():
        for length in residuals:
            of_length = replace(request, sampling=replace(request.sampling, ema=length))
            scores, evaluator = evaluate_state(of_length, state, trainer, evaluator)
            distances[length] = scores[evaluator.extractor.distance].value
    if is_first_process():
        show(state, residuals, distances, evaluator.extractor.distance)


def show(state: State, residuals: Mapping[float, float], distances: Mapping[float, float], name: str = "") -> None:
    """Print a line for each length; with distances, mark the best."""
    print(f"{state.path}: averages up to {state.images_seen:,} images")
    print(f"{'length':>8}  {'residual':>8}  {name}".rstrip())
    best = min(distances, key=distances.get, default=None)
    for length, residual in residuals.items():
        figure = f"{distances[length]:.4g}" + "  best" * (length == best) if distances else ""
        print(f"{length:>8}  {residual:>8.2g}  {figure}".rstrip())

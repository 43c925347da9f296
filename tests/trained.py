"""Training in this process: `debug=tiny`, without W&B, and without a trace in the process."""

import contextlib
import csv
import logging
import os
import shutil
import signal
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file

from train import job

RECIPES = ("celebahq", "ffhq", "lsun_bedrooms", "lsun_churches")  # the published ones
EXPERIMENTS = ("avatars", "celebahq", "lsun_churches")  # those that tests train
SMALL = "model.loss.discriminator.channels=8"
WEIGHTS = "diffusion_pytorch_model.safetensors"


SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def undisturbed():
    """Leave the process as it was; check that training gave the signals back. One thread: the networks are tiny."""
    levels = {logger: logger.level for logger in map(logging.getLogger, ("lightning.pytorch", "lightning.fabric"))}
    handlers, threads = [signal.getsignal(number) for number in SIGNALS], torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings(), torch.random.fork_rng():
            yield
    finally:
        torch.set_num_threads(threads)
        for logger, level in levels.items():
            logger.setLevel(level)
        assert [signal.getsignal(number) for number in SIGNALS] == handlers, "a signal was not given back"


def small(overrides):
    """The override that makes the discriminator small, where there is one: a quarter of the time of a training."""
    experiment = next((o.partition("=")[2] for o in overrides if o.startswith("experiment=")), "avatars")
    recipe, _, stage = experiment.partition("/")
    typed = any(o.startswith("model.loss.discriminator") for o in overrides)
    return [] if recipe not in RECIPES or stage == "diffusion" or typed else [SMALL]


def train(runs, *overrides):
    """`python train.py debug=tiny logger=csv paths.runs=<runs> <overrides>`; returns the last `val/loss`."""
    with undisturbed():
        return job(["debug=tiny", "logger=csv", f"paths.runs={runs}", *small(overrides), *overrides])


def copy(runs, target, name="celebahq"):
    """A run of its own folder in `target`, which is returned. Files are linked: training replaces them, whole."""
    shutil.copytree(Path(runs) / name, Path(target) / name, copy_function=os.link)
    return Path(target)


def snapshot(folder):
    """Every file below `folder` with its size and time of change: equal if nothing was touched."""
    return {p.relative_to(folder): (p.stat().st_size, p.stat().st_mtime_ns) for p in Path(folder).rglob("*")}


def metrics(stage_folder):
    """The rows of metrics.csv as numbers, by images seen."""
    with open(stage_folder / "metrics.csv", newline="", encoding="utf-8") as file:
        rows = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
    by_images = {int(row["images_seen"]): row for row in rows}
    assert len(by_images) == len(rows), "a row is there twice"
    return by_images


def final_weights(stage_folder):
    """The networks of a finished stage, by file."""
    final = Path(stage_folder) / "final"
    return {path.relative_to(final).as_posix(): load_file(path) for path in sorted(final.rglob("*.safetensors"))}


def last_checkpoint(stage_folder):
    """The newest training checkpoint, read as it must be readable."""
    return torch.load(Path(stage_folder) / "checkpoints/last.ckpt", weights_only=True)


def assert_equal(one, other, where=""):
    """Nested plain data and tensors are equal, these bit for bit."""
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_equal(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for place, pair in enumerate(zip(one, other, strict=True)):
            assert_equal(*pair, f"{where}/{place}")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    else:
        assert one == other, where

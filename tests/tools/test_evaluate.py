"""`python -m ldm_lab evaluate`: its flags, and two processes that come to the figures of one."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ldm_lab.metrics import features
from ldm_lab.tools.evaluate.command import FEATURES, main, parse
from tests.trained import copy

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--num-samples 1", "--num-samples 1: must be at least 2"),
        ("--steps 0", "--steps 0"),
        ("--devices 0", "--devices 0"),
        ("--bootstrap -1", "--bootstrap -1"),
        ("--image-size 3 4 5", "--image-size 3 4 5"),
        ("--image-size 0", "--image-size 0"),
        ("--autoencoder --snapshots", "exclude each other"),
        ("--autoencoder --save-reference new.npz", "--save-reference is for samples"),
        ("--export-best best", "--export-best is for --snapshots"),
        ("--guidance 2", "--guidance 2: needs --guide"),
        ("--guidance nan --guide x", "--guidance nan: must be a number, at least 0"),
        ("--guide x --guidance-interval 5 1", "--guidance-interval 5 1: must be two rising"),
        (f"--save-reference {__file__}", "is there already"),
    ],
)
def test_flags_that_cannot_be_end_in_one_line(flags, named):
    with pytest.raises(ValueError) as error:
        main(["runs/x", *flags.split()])
    assert named in str(error.value)
    assert "\n" not in str(error.value)


def test_a_side_stands_for_a_square():
    assert parse(["x", "--image-size", "32"]).image_size == (32, 32)
    assert parse(["x", "--image-size", "32", "48"]).image_size == (32, 48)
    assert parse(["x"]).image_size is None


def test_its_features_are_those_there_are():
    assert tuple(FEATURES) == features.FEATURES


def command(source, cache, *flags):
    """`python -m ldm_lab evaluate ...` as a user types it; Lightning starts the other processes."""
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    settings = ["--num-samples", "70", "--steps", "1", "--bootstrap", "3", "--accelerator", "cpu"]
    done = subprocess.run(
        [sys.executable, "-m", "ldm_lab", "evaluate", str(source), "--cache", str(cache), *settings, *flags],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.soak
def test_two_processes_come_to_the_figures_of_one(tiny_runs, tmp_path):
    contents = []
    for devices in (1, 2):
        run = copy(tiny_runs, tmp_path / str(devices)) / "celebahq"
        said = command(run, tmp_path / "cache", "--devices", str(devices))
        shutil.rmtree(tmp_path / "cache/references")  # the extractor stays: training it takes a minute
        assert said.count("fd_own ") == 1  # one process speaks
        (path,) = (run / "eval").glob("*.json")
        contents.append(json.loads(path.read_text()))
    one, two = contents
    assert one["extractor"] == two["extractor"]
    assert one["metrics"].keys() == two["metrics"].keys()
    for name, found in one["metrics"].items():
        assert two["metrics"][name] == pytest.approx(found, rel=1e-9, abs=1e-9), name

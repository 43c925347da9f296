"""A run that an older version of this package has begun goes on: with the losses that it would have had."""

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from ldm_lab.config import stages
from ldm_lab.config.compose import Recipe
from ldm_lab.utils.reading import read_yaml
from tests.trained import last_checkpoint, metrics, train

RUNS = Path(__file__).parents[1] / "golden/runs"
OLD = RUNS / "10e707e"
EXPECTED = json.loads((RUNS / "10e707e.json").read_text())
BEFORE_THE_MOVE = json.loads((RUNS / "08cd3fe.json").read_text())
TRAIN = "import sys; from tests.trained import train; train(*sys.argv[1:])"


@pytest.fixture
def runs(tmp_path):
    """Two folders with a run each: in `first` it is in the middle of stage 1, in `second` in that of stage 2."""
    for name in ("first", "second"):
        shutil.copytree(OLD / name, tmp_path / name / "run")
    return tmp_path


def command(stage, *more):
    """What continues them."""
    return [f"experiment=celebahq/{stage}", "name=run", "callbacks=none", *EXPECTED[stage]["overrides"], *more]


@pytest.mark.parametrize(("stage", "name"), [("autoencoder", "first"), ("diffusion", "second")])
def test_a_run_of_an_older_version_continues(runs, stage, name, capsys):
    """To the last digit on the machine that recorded it; the bounds are for the rounding of others."""
    folder = runs / name / "run" / stage
    assert "ldm_lab_format" not in {**read_yaml(folder / "config.yaml"), **last_checkpoint(folder)["ldm_lab"]}
    train(runs / name, *command(stage))
    said = capsys.readouterr().out
    assert f"continuing {folder} at 24 of 48 images" in said
    assert "another version" not in said  # what is new since leaves a run as it is
    rows = metrics(folder)
    assert list(rows) == [8, 16, 24, 32, 40, 48]
    for key in ("train/loss", "train/grad_norm"):
        found = [rows[images][key] for images in (32, 40, 48)]
        assert found == pytest.approx(EXPECTED[stage][key], rel=1e-3 if stage == "diffusion" else 1e-2), key
    assert json.loads((folder / "status.json").read_text())["finished"]
    assert read_yaml(folder / "config.yaml")["ldm_lab_format"] == 2
    assert last_checkpoint(folder)["ldm_lab"]["ldm_lab_format"] == 2


def test_a_changed_setting_of_an_older_run_is_still_one(runs):
    with pytest.raises(ValueError, match=r"other settings: model\.optimizer\.lr: 3\.6e-05 -> 0\.5\. Choose"):
        train(runs / "first", *command("autoencoder", "model.optimizer.lr=0.5"))


@pytest.mark.parametrize("typed", [[], ["model.train=all"]])
def test_a_run_of_before_some_settings_were_there_continues(runs, typed, capsys):
    """Where today's value is what was done without it nothing is said; the others are named."""
    path = runs / "first/run/autoencoder/config.yaml"
    config = read_yaml(path)
    del config["init"], config["model"]["train"], config["model"]["loss"]["perceptual_weight"]
    del config["data"]["flip"], config["data"]["module"]["train_set"]["flip"], config["optimized_metric"]
    config["model"]["autoencoder"]["forgotten"] = 1
    path.write_text(yaml.safe_dump(config))
    recipe = Recipe.parse(["debug=tiny", f"paths.runs={runs}/first", *command("autoencoder", *typed)])
    stages.preflight(recipe.compose(), "", recipe.typed)
    start = f"{path.parent} was written by another version: these settings"
    added = "init=None, data.flip=False, data.module.train_set.flip=False"
    assert capsys.readouterr().out.splitlines()[:2] == [
        f"{start} are new, and have their defaults: {added}",
        f"{start} no longer exist: model.autoencoder.forgotten=1",
    ]


@pytest.mark.parametrize(("stage", "name"), [("autoencoder", "first"), ("diffusion", "second")])
def test_a_run_of_before_the_modules_moved_continues_bit_for_bit(tmp_path, stage, name):
    """The environment of the process names the instructions that every x86 CPU has: bits are equal on all of them."""
    shutil.copytree(RUNS / "08cd3fe" / name, tmp_path / "run")
    environment = {**os.environ, **BEFORE_THE_MOVE["environment"], "LDM_LAB_CACHE": str(tmp_path / "cache")}
    said = subprocess.run(
        [sys.executable, "-c", TRAIN, str(tmp_path), *command(stage)],
        env=environment, cwd=RUNS.parents[2], check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    folder, expected = tmp_path / "run" / stage, BEFORE_THE_MOVE[stage]
    assert f"continuing {folder} at 24 of 48 images" in said
    rows = metrics(folder)
    for key in ("train/loss", "train/grad_norm"):
        assert [rows[images][key] for images in (32, 40, 48)] == pytest.approx(expected[key], rel=1e-4)
    weights = hashlib.sha256()
    for key, value in sorted(last_checkpoint(folder)["state_dict"].items()):
        weights.update(key.encode() + value.contiguous().numpy().tobytes())
    if torch.__version__.split("+")[0] == BEFORE_THE_MOVE["torch"] and platform.machine() == "x86_64":
        assert weights.hexdigest() == expected["weights"]

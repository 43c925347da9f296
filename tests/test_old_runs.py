"""A run that an older version of this package has begun goes on: with the losses that it would have had."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from ldm_lab import stages
from ldm_lab.config import Recipe
from ldm_lab.untrusted import read_yaml
from tests.runs import last_checkpoint, metrics, train

RUNS = Path(__file__).parent / "golden/runs"
OLD = RUNS / "10e707e"
EXPECTED = json.loads((RUNS / "10e707e.json").read_text())


@pytest.fixture
def runs(tmp_path):
    """A folder with both runs: `first` in the middle of stage 1, `second` in the middle of stage 2."""
    shutil.copytree(OLD, tmp_path / "runs")
    return tmp_path / "runs"


@pytest.mark.parametrize(("stage", "name"), [("autoencoder", "first"), ("diffusion", "second")])
def test_a_run_of_an_older_version_continues(runs, stage, name, capsys):
    """Bit for bit on the machine that recorded it; the bounds are what another one's rounding may grow to."""
    folder, expected = runs / name / stage, dict(EXPECTED[stage])
    assert "ldm_lab_format" not in {**read_yaml(folder / "config.yaml"), **last_checkpoint(folder)["ldm_lab"]}
    train(runs, f"experiment=celebahq/{stage}", f"name={name}", "callbacks=none", *expected.pop("overrides"))
    said = capsys.readouterr().out
    assert f"continuing {folder} at 24 of 48 images" in said
    assert "another version" not in said  # what is new since leaves a run as it is
    rows = metrics(folder)
    assert list(rows) == [8, 16, 24, 32, 40, 48]
    for key, values in expected.items():
        found = [rows[images][key] for images in (32, 40, 48)]
        assert found == pytest.approx(values, rel=1e-3 if stage == "diffusion" else 1e-2), key
    assert json.loads((folder / "status.json").read_text())["finished"]
    assert read_yaml(folder / "config.yaml")["ldm_lab_format"] == 2
    assert last_checkpoint(folder)["ldm_lab"]["ldm_lab_format"] == 2


def test_a_changed_setting_of_an_older_run_is_still_one(runs):
    words = ["experiment=celebahq/autoencoder", "name=first", "callbacks=none", *EXPECTED["autoencoder"]["overrides"]]
    with pytest.raises(ValueError, match=r"other settings: model\.optimizer\.lr: 3\.6e-05 -> 0\.5\. Choose"):
        train(runs, *words, "model.optimizer.lr=0.5")


@pytest.mark.parametrize("typed", [[], ["model.train=all"]])
def test_a_run_of_before_some_settings_were_there_continues(runs, typed, capsys):
    """Not one of today's keys is asked for where its value is what was done without it; the others are named."""
    path = runs / "first/autoencoder/config.yaml"
    config = read_yaml(path)
    del config["init"], config["model"]["train"], config["model"]["loss"]["perceptual_weight"]
    del config["data"]["flip"], config["data"]["module"]["train_set"]["flip"], config["optimized_metric"]
    config["model"]["autoencoder"]["forgotten"] = 1
    path.write_text(yaml.safe_dump(config))
    words = ["experiment=celebahq/autoencoder", "debug=tiny", f"paths.runs={runs}", "name=first", *typed]
    recipe = Recipe.parse([*words, *EXPECTED["autoencoder"]["overrides"]])
    stages.preflight(recipe.compose(), "", recipe.typed)
    start = f"{path.parent} is of another version: settings that it"
    assert capsys.readouterr().out.splitlines()[:2] == [
        f"{start} did not know, with their defaults now: init=None, data.flip=False",
        f"{start} had, and nothing knows now: model.autoencoder.forgotten=1",
    ]

"""`data.value_range=measure` is measured once; the numbers stay with the run."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from ldm_lab.config import stages
from ldm_lab.config.compose import Recipe, build, plain
from ldm_lab.utils.errors import UserError
from ldm_lab.utils.nested import find
from ldm_lab.utils.pixels import PixelFormat
from ldm_lab.utils.reading import read_yaml
from tests.data.pictures import field
from tests.trained import metrics, train

DEEP = PixelFormat(3, (-3, 900))


@pytest.fixture
def root(tmp_path):
    (tmp_path / "fields").mkdir()
    for index in range(24):
        np.save(tmp_path / f"fields/{index:02}.npy", field(DEEP, index, (32, 32)))
    return tmp_path / "fields"


def recipe(tmp_path, root, *more, experiment="celebahq"):
    where = [f"data.root={root}", f"paths.runs={tmp_path}/runs", f"paths.cache={tmp_path}/cache"]
    return Recipe.parse([f"experiment={experiment}", "debug=tiny", "data.value_range=measure", *where, *more])


def settings(recipe):
    return {config.stage: stages.initial_settings(config, recipe.typed) for config in recipe.compose()}


def kept(folder, value_range):
    """A stage's folder whose run was started with a range."""
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints/last.ckpt").touch()
    (folder / "config.yaml").write_text(yaml.safe_dump({"max_images": 8, "data": {"value_range": value_range}}))


def test_the_numbers_take_the_place_of_measure(tmp_path, root):
    made = recipe(tmp_path, root)
    changes = settings(made)
    low, high = changes["autoencoder"]["data.value_range"]
    assert -3 <= low < high <= 900
    assert changes["diffusion"] == changes["autoencoder"]
    for config in made.compose(changes):
        for key in ("data", "data.module.train_set", "data.module.val_set"):
            assert find(plain(config), f"{key}.value_range") == [low, high]
    assert "data.value_range=measure" in made.command("diffusion")
    assert len(list((tmp_path / "cache/ranges").glob("*.json"))) == 1


@pytest.mark.parametrize("value_range", ["null", "[-3,900]"])
def test_other_ranges_open_no_image(tmp_path, value_range):
    assert settings(recipe(tmp_path, tmp_path / "missing", f"data.value_range={value_range}")) == {
        "autoencoder": {},
        "diffusion": {},
    }


def test_a_run_keeps_its_numbers_and_hands_them_to_stage_2(tmp_path):
    folder = tmp_path / "runs/celebahq"
    kept(folder / "autoencoder", [0.5, 7.0])
    made = recipe(tmp_path, tmp_path / "missing")
    assert {stage: one["data.value_range"] for stage, one in settings(made).items()} == {
        "autoencoder": [0.5, 7.0],
        "diffusion": [0.5, 7.0],
    }
    elsewhere = recipe(
        tmp_path,
        tmp_path / "missing",
        "name=other",
        f"autoencoder={folder}/autoencoder/checkpoints/last.ckpt",
        experiment="celebahq/diffusion",
    )
    assert settings(elsewhere) == {"diffusion": {"data.value_range": [0.5, 7.0]}}
    kept(folder / "diffusion", [1.0, 2.0])
    assert settings(made)["diffusion"] == {"data.value_range": [1.0, 2.0]}


@pytest.mark.parametrize("value", ["wide", "[1]", "[2,1]", "[0,x]", "5"])
def test_a_bad_range_is_named(tmp_path, root, value):
    config = recipe(tmp_path, root, f"data.value_range={value}").compose()[0]
    with pytest.raises(UserError, match=r"value_range=") as error:
        build(config.data.module, "data.module")
    assert "\n" not in str(error.value)


def test_training_measures_once_and_continues_with_the_numbers(tmp_path, root):
    line = ["experiment=celebahq/autoencoder", f"data.root={root}", f"paths.cache={tmp_path}/cache"]
    line += ["data.value_range=measure", "max_images=16", "checkpoint_every=16", "validate_every=16"]
    train(tmp_path, *line)
    folder = Path(tmp_path, "celebahq/autoencoder")
    numbers = read_yaml(folder / "config.yaml")["data"]["value_range"]
    assert len(numbers) == 2
    shutil.rmtree(tmp_path / "cache")
    train(tmp_path, *line[:-3], "max_images=32", "checkpoint_every=16", "validate_every=16")
    assert read_yaml(folder / "config.yaml")["data"]["value_range"] == numbers
    assert not (tmp_path / "cache/ranges").exists()
    assert max(metrics(folder)) == 32

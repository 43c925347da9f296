"""Adding a setting, a metric, a sampler or a recipe touches one place, and so does removing it."""

import shutil
from typing import Annotated

import pytest
from omegaconf import OmegaConf

from ldm_lab.config import files, kinds
from ldm_lab.config.build import build
from ldm_lab.config.compose import Recipe, compose_sample, plain
from ldm_lab.config.files import CONFIGS, ConfigError
from ldm_lab.diffusion import samplers
from ldm_lab.diffusion.ddim import DDIMScheduler
from ldm_lab.runs import metrics
from ldm_lab.runs.changes import compare as changes
from ldm_lab.runs.record import read_run
from ldm_lab.tools.dashboard import layout
from ldm_lab.tools.report.compare import compare
from ldm_lab.tools.report.content import content
from ldm_lab.tools.report.pictures import Budget
from ldm_lab.utils.errors import UserError
from ldm_lab.utils.limits import Count, Harmless, Positive
from tests.tools.report.runs import write_evaluation, write_run


@pytest.fixture
def configs(tmp_path, monkeypatch):
    """A copy of `configs/`, which files can be added to."""
    folder = tmp_path / "configs"
    shutil.copytree(CONFIGS, folder, ignore=shutil.ignore_patterns("local"))
    monkeypatch.setattr(files, "CONFIGS", folder)
    return folder


# --- a setting: the annotation of an argument


class Blur:
    """Of a plugin."""

    def __init__(self, radius: Count, strength: Positive = 1.0, threads: Annotated[Count | None, Harmless] = None):
        self.radius, self.strength, self.threads = radius, strength, threads


def blur(**settings):
    return {"model": {"blur": {"_target_": f"{__name__}.Blur", "radius": 2, **settings}}}


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("radius", 0, "a whole number, at least 1"),
        ("radius", "wide", "a whole number, at least 1"),
        ("strength", 0.0, "a number above 0"),
        ("threads", 0, "a whole number, at least 1 or null"),
    ],
)
def test_a_constructor_says_which_values_its_arguments_take(key, value, wanted):
    kinds.check(blur(radius=3, strength=0.5, threads=None))
    with pytest.raises(UserError) as error:
        kinds.check(blur(**{key: value}))
    assert str(error.value) == f"model.blur.{key}={value}: must be {wanted}"
    with pytest.raises(UserError) as error:
        build(OmegaConf.create(blur(**{key: value})["model"]["blur"]), "model.blur")
    assert str(error.value) == f"model.blur: {key}={value!r}: must be {wanted}"


def test_a_constructor_says_which_arguments_a_run_may_change():
    assert changes(blur(threads=1), blur(threads=8)).changed == []
    assert changes(blur(radius=2), blur(radius=3)).changed == ["model.blur.radius: 2 -> 3"]


def test_a_key_that_several_constructors_follow_has_their_default():
    def data(**keys):
        sets = {name: {"_target_": f"{__name__}.Blur", "radius": 1} for name in ("train_set", "val_set")}
        return {"data": {**keys, "module": sets}}

    assert changes(data(), data(strength=1.0)).added == []
    assert changes(data(), data(strength=2.0)).changed == ["data.strength: None -> 2.0"]
    assert changes(data(), data(unknown=2.0)).added == ["data.unknown=2.0"]


# --- a metric: its registration

SHARPNESS = metrics.Metric("eval/sharpness", "of edges", "quality", ("diffusion",), "higher", main=True)


def shown(folder):
    """Of the new metric: section of the dashboard, result of a comparison, and whether the report marks the better."""
    sections = layout.sections("diffusion", {"val/loss", "eval/sharpness"})
    (section,) = {section.name for section in sections for panel in section.panels if "eval/sharpness" in panel.keys}
    runs = [read_run(folder / name) for name in "ab"]
    results = {found.metric: found.says for found in compare(runs, "ab")}
    (row,) = [row for row in content(runs, Budget())["metrics"] if row["metric"] == "eval/sharpness"]
    return section, results.get("eval/sharpness"), row["better"]


def test_a_metric_that_is_registered_is_in_the_report_and_on_the_dashboard(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "METRICS", list(metrics.METRICS))
    for name, value in (("a", 2.0), ("b", 3.0)):
        write_run(tmp_path / name)
        write_evaluation(tmp_path / name, {"sharpness": value})
    assert shown(tmp_path) == ("More", None, None)
    metrics.register(SHARPNESS)
    assert shown(tmp_path) == ("Quality over images seen", "b is better: 50 % higher than a", "higher")
    metrics.METRICS.remove(SHARPNESS)
    assert shown(tmp_path) == ("More", None, None)


# --- a sampler: its class, registered, and its defaults


class OwnScheduler(DDIMScheduler):
    """DDIM by another name."""


def test_a_sampler_that_is_registered_can_be_asked_for(configs, monkeypatch):
    with pytest.raises(ConfigError, match="sampler=own: there is no such option"):
        compose_sample(["ckpt=x", "sampler=own"])
    (configs / "sampler/own.yaml").write_text("# Mine\nname: own\nsteps: 7 # evaluations of the UNet\neta: 0.5\n")
    monkeypatch.setitem(samplers.SAMPLERS, "own", OwnScheduler)
    chosen = compose_sample(["ckpt=x", "sampler=own"]).sampler
    scheduler = samplers.choose(chosen.name, DDIMScheduler(num_train_timesteps=100), chosen.eta)
    assert (type(scheduler), scheduler.config.num_train_timesteps, chosen.steps) == (OwnScheduler, 100, 7)
    monkeypatch.delitem(samplers.SAMPLERS, "own")
    with pytest.raises(UserError, match=r"^sampler=own: there are ddim, ddpm, dpm_solver, flow_euler, flow_heun$"):
        samplers.choose(chosen.name, DDIMScheduler())


# --- a recipe: its difference to another

OTHER = """# @package _global_
# The autoencoder of CelebA-HQ, of mirrored faces.
defaults:
  - /experiment/celebahq/autoencoder

name: mine # of the run
data:
  flip: true # exchange left and right in half of the training images
"""


def test_a_recipe_is_its_difference_to_another(configs):
    (configs / "experiment/mine").mkdir()
    file = configs / "experiment/mine/autoencoder.yaml"
    file.write_text(OTHER)
    base, mine = (
        plain(Recipe.parse([f"experiment={name}/autoencoder", "data.root=x"]).compose()[0])
        for name in ("celebahq", "mine")
    )
    assert (mine["name"], mine["data"]["flip"], mine["data"]["module"]["train_set"]["flip"]) == ("mine", True, True)
    assert mine["model"] == base["model"]
    file.unlink()
    with pytest.raises(ConfigError, match="experiment=mine/autoencoder: no such experiment"):
        Recipe.parse(["experiment=mine/autoencoder"])

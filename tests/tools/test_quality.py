"""`python -m ldm_lab quality`: every variant is a training that can be composed; the table holds what was found."""

import argparse
import json

import pytest

from ldm_lab.config.compose import Recipe
from ldm_lab.runs.record import Evaluation
from ldm_lab.tools import quality


def evaluation(path, **metrics):
    return Evaluation(path, {"metrics": {name: {"value": value} for name, value in metrics.items()}})


@pytest.mark.parametrize("variant", quality.VARIANTS, ids=lambda variant: variant.name)
def test_a_variant_is_the_demo_with_something_changed(variant):
    def composed(settings):
        (config,) = Recipe.parse(["experiment=avatars/diffusion", *settings]).compose()
        return config.model

    demo, model = composed(()), composed(variant.settings)
    assert (model == demo) == (not variant.settings)
    assert variant.first_stage in quality.FIRST_STAGES


@pytest.mark.parametrize("name", quality.FIRST_STAGES)
def test_first_stages_can_be_composed(name):
    Recipe.parse(["experiment=avatars/autoencoder", *quality.FIRST_STAGES[name]]).compose()


def test_rows_can_be_trained_on_other_images(tmp_path, monkeypatch):
    options = quality.parser().parse_args(["--experiment", "folder", "--runs", str(tmp_path), "data.root=/emoji"])
    shop, lines = quality.Workshop(options), []
    monkeypatch.setattr(shop, "command", lambda *words: lines.append(words))
    shop.train_first_stage("kl", 1)
    shop.train(quality.DEMO, 1)
    for stage, words in zip(("autoencoder", "diffusion"), lines, strict=True):
        (config,) = Recipe.parse(words[1:]).compose()
        assert (config.stage, config.seed, config.data.module.train_set.root) == (stage, 1, "/emoji")
        assert words[1] == f"experiment=folder/{stage}"


def test_rows_hold_all_seeds_with_their_intervals(tmp_path):
    shop = quality.Workshop(argparse.Namespace(runs=tmp_path, only=["demo"], seeds=2))
    one = evaluation(tmp_path, fd_avatars=66.04, precision=0.5)
    two = Evaluation(tmp_path, {"metrics": {"fd_avatars": {"value": 60.0, "low": 58.5, "high": 61.0}}})
    assert shop.head("question", one, ("precision",)) == ["| question | fd_avatars | precision |", "|---|---|---|"]
    assert shop.rows(["demo"], [one, two], ("precision",)) == ["| demo | 66 / 60 (58.5, 61) | 0.5 / - |"]


def test_a_command_that_fails_is_named_with_its_last_line(tmp_path):
    shop = quality.Workshop(argparse.Namespace(runs=tmp_path, only=quality.CHOICES, seeds=1, jobs=1))
    with pytest.raises(ValueError, match="-m ldm_lab nothing failed"):
        shop.command("-m", "ldm_lab", "nothing")
    assert len(shop.variants) == len(quality.VARIANTS)


@pytest.mark.soak
def test_the_table_is_made_and_made_again_for_nothing(tmp_path, capsys):
    tiny = ["--runs", str(tmp_path), "--budget", "32", "--first-stage", "32", "--samples", "8", "--seeds", "1"]
    flags = [*tiny, "--only", "kl", "left_alone", "--cache", str(tmp_path / "cache"), "debug=tiny", "data=avatars"]
    quality.main(flags)
    found = (tmp_path / "quality.md").read_text()
    assert "| first stage: KL |" in found
    folders = list(tmp_path.glob("kl_0/tables/*/*.json"))
    assert json.loads(folders[0].read_text())["num_samples"] == 8
    written = folders[0].stat().st_mtime_ns
    capsys.readouterr()
    quality.main(flags)
    assert (tmp_path / "quality.md").read_text() == found
    assert folders[0].stat().st_mtime_ns == written


def test_a_guided_row_is_guided_by_its_own_snapshot(tmp_path, monkeypatch):
    (variant,) = (one for one in quality.VARIANTS if one.guidance != 1)
    options = quality.parser().parse_args(["--runs", str(tmp_path), "--only", variant.name, "--samples", "8"])
    shop, lines = quality.Workshop(options), []
    monkeypatch.setattr(shop, "command", lambda *words: lines.append(" ".join(words)))
    monkeypatch.setattr(quality, "read_evaluation", lambda path: path)
    shop.train(variant, 0)
    with pytest.raises(StopIteration):  # nothing was written
        shop.evaluate(variant, 0, quality.STANDARD)
    run = tmp_path / f"{variant.name}_0"
    (config,) = Recipe.parse(lines[0].split()[1:]).compose()
    assert config.snapshots == 5600  # so the recipe keeps the guide
    assert f"--guidance 1.5 --guide {run}@5600" in lines[1]
    folder = run / "tables/num-samples_8_sampler_dpm_solver_steps_20_eta_0_guidance_1.5"
    assert str(folder) in lines[1]

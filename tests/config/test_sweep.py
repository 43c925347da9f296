"""`-m`: recipes through Hydra's sweeper, a run of its own name for each job."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser

from ldm_lab.checkpoints.checkpoint import fingerprint
from ldm_lab.config.compose import Recipe
from ldm_lab.config.files import ConfigError
from ldm_lab.config.sweep import job_name, pack, search_lines, unpack
from ldm_lab.models.vq_model import VQModel
from tests.trained import copy

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "train.py", "-m", "debug=tiny", "logger=csv", "callbacks=none"]


def sweep(*overrides):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*COMMAND, *overrides], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    "lines",
    [
        ["experiment=celebahq", "trainer=ddp", "trainer.devices=2", "data.root=/a b/c"],
        ["+callbacks.mine._target_=a.B", "++model.ema.decay=0.5", "~callbacks.sample_grid", "~logger.wandb=null"],
        ["data.image_size=[64,32]", "name='a=b'", "seed=1", "seed=2"],
        ["+x.y={a:1,b:[2,3]}"],
    ],
)
def test_overrides_travel_unchanged(lines):
    packed = pack(lines)
    OverridesParser.create().parse_overrides(packed)  # Hydra's grammar takes them
    expected = [line if "=" in line else f"{line}=null" for line in lines]  # `~key` needs a value to travel
    assert unpack(packed) == expected
    assert len({line.split("=", 1)[0] for line in packed}) == len(lines), "one would overwrite another"


def test_settings_of_hydra_are_not_packed():
    lines = ["hydra.sweep.dir=/x", "hydra/launcher=joblib", "seed=1,2"]
    assert pack(lines) == [*lines[:2], "+set.s2.seed=1,2"]
    assert unpack(["hydra.sweep.dir=/x", "paths.runs=/y", "+set.s2.seed=1"]) == ["seed=1"]


def test_a_job_is_named_after_its_swept_values():
    swept = ["seed", "model.unet.dropout", "mine"]
    lines = ["experiment=celebahq", "seed=3", "++model.unet.dropout=0.1", "max_images=8", "+mine=/a b/c"]
    assert job_name("celebahq", swept, lines) == "celebahq-seed-3-model.unet.dropout-0.1-mine-a_b_c-1a448f"
    assert job_name("mine", [], lines) == "mine"
    other = [line.replace("max_images=8", "max_images=16") for line in lines]
    assert job_name("celebahq", swept, other) == job_name("celebahq", swept, lines)  # nothing else decides


@pytest.mark.parametrize("trainer", ["trainer=ddp", "trainer.accelerator=cpu"])  # which is ddp, too
def test_several_devices_are_refused_in_one_line(trainer):
    refused = sweep(trainer, "trainer.devices=2", "seed=1,2")
    assert refused.returncode == 1
    assert refused.stdout == ""
    assert refused.stderr.startswith("error: -m with trainer.devices=2: ")
    assert refused.stderr.count("\n") == 1


def test_an_error_of_hydra_is_one_line():
    refused = sweep("hydra/launcher=nobody", "seed=1,2")
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: ")
    assert "hydra/launcher/nobody" in refused.stderr
    assert refused.stderr.count("\n") == 1


@pytest.mark.slow
def test_each_job_is_a_run_with_its_own_autoencoder(tmp_path):
    done = sweep("experiment=avatars", "seed=1,2", f"paths.runs={tmp_path}")
    assert done.returncode == 0, done.stderr
    runs = [tmp_path / f"avatars-seed-{seed}" for seed in (1, 2)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["avatars-seed-1", "avatars-seed-2", "multirun"]
    assert [path.name for path in (tmp_path / "multirun").iterdir()] == ["multirun.yaml"]
    hashes = []
    for run in runs:
        status = json.loads((run / "diffusion/status.json").read_text())
        hashes.append(status["autoencoder"])
        assert status["finished"] is True
        own = VQModel.from_pretrained(run / "autoencoder/final")
        assert status["autoencoder"] == fingerprint(own)
        assert fingerprint(VQModel.from_pretrained(run / "vqvae")) == fingerprint(own)
    assert hashes[0] != hashes[1]
    again = sweep("experiment=avatars", "seed=1,nonsense", f"paths.runs={tmp_path}")  # the first job is found again
    assert again.returncode == 1
    assert again.stdout.count("nothing to do") == 2
    assert again.stderr.splitlines()[-1] == "error: seed=nonsense: must be a whole number, at least 0"


@pytest.mark.soak
def test_a_sweep_of_stage_2_alone_takes_the_first_stage_of_the_run(tiny_runs, tmp_path):
    runs = copy(tiny_runs, tmp_path)
    done = sweep("experiment=celebahq/diffusion", "model.optimizer.lr=1e-4,3e-4", f"paths.runs={runs}")
    assert done.returncode == 0, done.stderr
    hashes = {
        json.loads((runs / f"celebahq{job}/diffusion/status.json").read_text())["autoencoder"]
        for job in ("", "-model.optimizer.lr-0.0001", "-model.optimizer.lr-0.0003")
    }
    assert len(hashes) == 1


# --- searches


def test_a_search_is_the_overrides_that_its_file_stands_for():
    search = {
        "defaults": ["_self_", {"override /hydra/sweeper": "optuna"}],
        "optimized_metric": "val/psnr",
        "data": {"flip": True},
        "hydra": {"sweeper": {"n_trials": 3, "sampler": {"seed": None}, "params": {"model.optimizer.lr": "1e-4,1e-3"}}},
    }
    assert search_lines(search) == [
        "hydra/sweeper=optuna",
        "hydra.sweeper.n_trials=3",
        "hydra.sweeper.sampler.seed=null",
        "optimized_metric=val/psnr",
        "data.flip=True",
        "model.optimizer.lr=1e-4,1e-3",
    ]


def test_a_search_without_m_or_of_no_such_name_is_refused():
    with pytest.raises(ConfigError, match=r"^hparams_search=grid is a sweep of many jobs: add -m$"):
        Recipe.parse(["hparams_search=grid"])
    refused = sweep("hparams_search=gird")
    assert refused.stderr == "error: hparams_search=gird: there is no such search; there are: grid, optuna\n"


@pytest.mark.soak
def test_a_guided_search_minimises_and_finds_its_jobs_again(tiny_runs, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    runs = copy(tiny_runs, tmp_path, "avatars")
    command = ("hparams_search=optuna", "hydra.sweeper.n_trials=2", "experiment=avatars/diffusion", "max_images=16")
    done = sweep(*command, f"paths.runs={runs}")
    assert done.returncode == 0, done.stderr
    jobs = sorted(runs.glob("avatars-model.optimizer.lr-*"))
    losses = {job.name: json.loads((job / "diffusion/status.json").read_text())["val/loss"] for job in jobs}
    assert len(losses) == 2
    best = yaml.safe_load((runs / "multirun/optimization_results.yaml").read_text())
    assert best["best_value"] == min(losses.values())
    again = sweep(*command, f"paths.runs={runs}")
    assert again.stdout.count("nothing to do") == 2
    assert sorted(runs.glob("avatars-model.optimizer.lr-*")) == jobs

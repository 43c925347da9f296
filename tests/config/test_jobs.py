"""The jobs of a sweep that another process runs: packages, turns under Slurm, one GPU for each worker."""

import os
import signal
import subprocess
from types import SimpleNamespace

import pytest

from ldm_lab.config import jobs
from ldm_lab.config.compose import sweep
from ldm_lab.config.files import ConfigError
from ldm_lab.utils.errors import UserError
from ldm_lab.utils.signals import status_of


@pytest.fixture(autouse=True)
def _untouched(monkeypatch):
    """Environment and signals are given back."""
    monkeypatch.setattr(jobs, "listen", lambda: None)
    monkeypatch.setattr(jobs, "_taken", None)
    for key in ("SUBMITIT_PREEMPT_SIGNAL", "HYDRA_FULL_ERROR", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(key, "")
        monkeypatch.delenv(key)


@pytest.mark.parametrize(
    ("choice", "package", "extra"),
    [
        ("hydra/launcher=submitit_slurm", "hydra-submitit-launcher", "slurm"),
        ("hydra/launcher=joblib", "hydra-joblib-launcher", "sweeps"),
        ("hydra/sweeper=optuna", "hydra-optuna-sweeper", "sweeps"),
    ],
)
def test_a_missing_package_is_one_line_with_its_extra(monkeypatch, choice, package, extra):
    monkeypatch.setattr(jobs, "_is_there", lambda plugin: False)
    with pytest.raises(ConfigError) as refused:
        sweep([choice, "seed=1,2"], print)
    assert str(refused.value) == f'{choice}: {package} is not installed: pip install -e ".[{extra}]"'


def test_slurm_warns_by_the_signal_that_training_heeds():
    jobs.prepare(["hydra/launcher=nobody_knows", "seed=1,2"])
    assert os.environ["SUBMITIT_PREEMPT_SIGNAL"] == "USR1"


@pytest.fixture
def calls(monkeypatch):
    """What a job of Slurm calls."""
    found = []
    for key, value in {"JOB_ID": "4711", "ARRAY_JOB_ID": "4711", "ARRAY_TASK_ID": "1"}.items():
        monkeypatch.setenv(f"SLURM_{key}", value)
    monkeypatch.setattr(subprocess, "run", lambda words, check: found.append(words))
    return found


def launched_by(monkeypatch, name):
    config = SimpleNamespace(launcher=SimpleNamespace(_target_=f"hydra_plugins.x.{name}"))
    monkeypatch.setattr(jobs.HydraConfig, "get", lambda: config)


@pytest.mark.parametrize(
    ("launcher", "status", "rank", "queued"),
    [
        ("SlurmLauncher", status_of(signal.SIGUSR1), "0", True),
        ("SlurmLauncher", status_of(signal.SIGUSR1), "1", False),
        ("SlurmLauncher", status_of(signal.SIGTERM), "0", False),
        ("JoblibLauncher", status_of(signal.SIGUSR1), "0", False),
    ],
)
def test_a_job_whose_time_is_over_is_queued_again_once(monkeypatch, tmp_path, calls, launcher, status, rank, queued):
    launched_by(monkeypatch, launcher)
    monkeypatch.setenv("SLURM_PROCID", rank)
    with pytest.raises(SystemExit) as end, jobs.turn(tmp_path):
        raise SystemExit(status)
    assert end.value.code == status
    assert calls == [["scontrol", "requeue", "4711_1"]] * queued


@pytest.mark.parametrize(("launcher", "raised"), [("SlurmLauncher", UserError), ("BasicLauncher", SystemExit)])
def test_the_line_of_a_job_reaches_the_command(monkeypatch, tmp_path, calls, launcher, raised):
    launched_by(monkeypatch, launcher)
    with pytest.raises(raised, match="seed=x: must be"), jobs.turn(tmp_path):
        raise SystemExit("error: seed=x: must be")
    assert calls == []


def test_each_worker_has_a_gpu_of_its_own(monkeypatch, tmp_path):
    taken = []
    for _ in range(2):
        monkeypatch.setattr(jobs, "_taken", None)  # another worker
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
        jobs.take_gpu(tmp_path)
        taken.append((os.environ["CUDA_VISIBLE_DEVICES"], jobs._taken))
        jobs.take_gpu(tmp_path)  # the worker's next job
        assert os.environ["CUDA_VISIBLE_DEVICES"] == taken[-1][0]
    assert [gpu for gpu, _ in taken] == ["3", "5"]
    monkeypatch.setattr(jobs, "_taken", None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    with pytest.raises(UserError, match=r"^hydra\.launcher\.n_jobs: more workers than the 2 GPUs; set 2$"):
        jobs.take_gpu(tmp_path)
    taken[0][1].release()  # it has ended
    jobs.take_gpu(tmp_path)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3"


def test_gpus_are_counted_without_cuda(monkeypatch, tmp_path):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'GPU 0: A'\necho '  MIG 1g: x'\necho 'GPU 1: A'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert jobs.visible_gpus() == ["0", "1"]
    program.unlink()
    assert jobs.visible_gpus() == []

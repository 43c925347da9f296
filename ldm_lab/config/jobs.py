"""Runs the jobs of a sweep away from its command: as jobs of Slurm (submitit), or in worker processes (joblib)."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import filelock
from hydra.core.hydra_config import HydraConfig

from ldm_lab.config.files import ConfigError
from ldm_lab.utils.errors import UserError
from ldm_lab.utils.signals import listen, status_of
from ldm_lab.utils.terminal import is_first_process

# A choice of Hydra -> the package that has it, and our extra that installs the package.
PACKAGES = {
    "hydra/launcher=submitit_slurm": ("hydra_submitit_launcher", "slurm"),
    "hydra/launcher=submitit_local": ("hydra_submitit_launcher", "slurm"),
    "hydra/launcher=joblib": ("hydra_joblib_launcher", "sweeps"),
    "hydra/sweeper=optuna": ("hydra_optuna_sweeper", "sweeps"),
}
_taken: filelock.FileLock | None = None  # the lock of this worker's GPU


def prepare(lines: list[str]) -> None:
    """Check a sweep's choices of launcher and sweeper, before Hydra looks for them.

    Raises:
        ConfigError: the package is not installed.
    """
    for line in lines:
        package, extra = PACKAGES.get(line, ("", ""))
        if package and not _is_there(package):
            name = package.replace("_", "-")
            raise ConfigError(f'{line}: {name} is not installed: pip install -e ".[{extra}]"')
    os.environ["SUBMITIT_PREEMPT_SIGNAL"] = "USR1"  # or Slurm sends SIGUSR2 ahead of the time limit
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors of jobs reach `reporting`


def _is_there(plugin: str) -> bool:
    # `hydra_plugins` is a namespace of all plugins, and itself missing where there are none.
    namespace = importlib.util.find_spec("hydra_plugins")
    return namespace is not None and importlib.util.find_spec(f"hydra_plugins.{plugin}") is not None


@contextlib.contextmanager
def turn(folder: Path) -> Iterator[None]:
    """Context of one turn of a job: signals stop it, and Slurm queues it again where its time was over.

    Args:
        folder: of the sweep; holds the locks of GPUs.

    Raises:
        UserError: the job has ended with one line; a launcher carries exceptions to the command, but no exit.
    """
    launcher = HydraConfig.get().launcher._target_.rpartition(".")[2]
    if launcher == "BasicLauncher":
        yield
        return
    listen()
    if launcher == "JoblibLauncher":
        take_gpu(folder)
    try:
        yield
    except SystemExit as end:
        if end.code == status_of(signal.SIGUSR1) and launcher == "SlurmLauncher" and is_first_process():
            subprocess.run(["scontrol", "requeue", _number_of_job()], check=True)
        if isinstance(end.code, str):
            raise UserError(end.code.removeprefix("error: ")) from end
        raise


def _number_of_job() -> str:
    # The number of an array's last task is also that of the whole array.
    array, task = (os.environ.get(f"SLURM_ARRAY_{part}_ID") for part in ("JOB", "TASK"))
    return f"{array}_{task}" if array else os.environ["SLURM_JOB_ID"]


def take_gpu(folder: Path) -> None:
    """Let this process see one GPU that no other worker of the sweep sees, as long as it lives; call before torch.

    Args:
        folder: holds a lock for each GPU.

    Raises:
        UserError: there are more workers than GPUs.
    """
    global _taken
    if _taken is not None or len(gpus := visible_gpus()) < 2:
        return
    for gpu in gpus:
        lock = filelock.FileLock(folder / f"gpu-{gpu}.lock", timeout=0)
        with contextlib.suppress(filelock.Timeout):
            lock.acquire()
            _taken, os.environ["CUDA_VISIBLE_DEVICES"] = lock, gpu
            return
    raise UserError(f"hydra.launcher.n_jobs: more workers than the {len(gpus)} GPUs; set {len(gpus)}")


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES may name here, without starting CUDA; empty where there is no NVIDIA GPU."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name]
    if not (program := shutil.which("nvidia-smi")):
        return []
    listed = subprocess.run([program, "-L"], capture_output=True, text=True, check=False).stdout
    return [str(number) for number, _ in enumerate(line for line in listed.splitlines() if line.startswith("GPU "))]

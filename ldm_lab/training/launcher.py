"""Starts the ranks of `trainer=ddp`, and checks Slurm's task count."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from lightning import Trainer
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from ldm_lab.training.watch import Watch
from ldm_lab.utils.errors import UserError
from ldm_lab.utils.terminal import is_first_process

PARENT = "LDM_LAB_LAUNCHER"  # environment variable: process id of the launching process


class Launcher(_SubprocessScriptLauncher):
    """Starts the ranks as Lightning does, and a `Watch` in each rank.

    Lightning's own observer also kills the launching process, so no process reports the failure. If the launching
    process dies, Lightning leaves the other ranks running.
    """

    def launch(self, function: Callable, *args: Any, trainer: Trainer | None = None, **kwargs: Any) -> Any:  # noqa: ANN401
        """Start the other ranks, unless a cluster or an earlier stage has started them; then call `function`."""
        environment = self.cluster_environment
        environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not environment.creates_processes_externally:
            os.environ[PARENT] = str(os.getpid())
            self._call_children_scripts()
        if Watch.current is None and (self.procs or parent()):
            first = environment.node_rank() * self.num_processes
            name = "torchrun" if TorchElasticEnvironment.detect() else f"rank {first}"
            Watch(first + environment.local_rank(), self.procs, parent(), name).start()
        _set_num_threads_if_needed(num_processes=self.num_processes)
        return function(*args, **kwargs)


def parent() -> int | None:
    """Process id of the launching rank or of torchrun's agent; None in the launching rank itself."""
    if TorchElasticEnvironment.detect():
        return os.getppid()
    launcher = int(os.environ.get(PARENT, os.getpid()))
    return launcher if launcher != os.getpid() else None


def check_tasks(devices: int, nodes: int) -> None:
    """Compare Slurm's tasks with the processes that training needs, one for each device of each node.

    A wrong count would make the processes wait for each other forever. There is no check outside of Slurm, in an
    interactive Slurm shell, or under torchrun. Call it before the processes form their group. Only the first process
    prints the error.

    Raises:
        UserError: there are more or fewer tasks, or the tasks need `srun` to start them.
    """
    if TorchElasticEnvironment.detect() or not SLURMEnvironment.detect():
        return
    tasks = int(os.environ["SLURM_NTASKS"])
    if tasks == devices * nodes and (tasks == 1 or "SLURM_STEP_ID" in os.environ):  # only srun sets this variable
        return
    if not is_first_process():
        sys.exit(1)
    if tasks != devices * nodes:
        raise UserError(
            f"Slurm has {tasks} task(s) (SLURM_NTASKS), but trainer.devices={devices} on trainer.num_nodes={nodes}"
            f" need {devices * nodes}, one for each device: change one or the other (see scripts/slurm.sh)"
        )
    raise UserError(f"Slurm has {tasks} tasks, but only one process: put srun before python (see scripts/slurm.sh)")

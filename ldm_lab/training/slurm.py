"""Checks Slurm's task count, as a wrong count makes the processes wait for each other forever."""

from __future__ import annotations

import os
import sys

from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

from ldm_lab.utils.errors import UserError
from ldm_lab.utils.terminal import is_first_process


def check_tasks(devices: int, nodes: int) -> None:
    """Compare Slurm's tasks with the processes that training needs, one for each device of each node.

    There is no check outside of Slurm, in an interactive Slurm shell, or under torchrun. Call it before the processes
    form their group. Only the first process prints the error.

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

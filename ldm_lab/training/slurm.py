"""What must hold where Slurm has started the processes; else they would wait for each other for ever."""

from __future__ import annotations

import os
import sys

from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

from ldm_lab.utils.errors import UserError
from ldm_lab.utils.terminal import is_first_process


def check_tasks(devices: int, nodes: int) -> None:
    """Compare Slurm's tasks with the processes that a training needs, one for each device of each node.

    Outside of Slurm, in a shell that it has given, and under torchrun, there is nothing to compare. Call it before
    the processes look for each other. The first process speaks for all.

    Raises:
        UserError: there are more or fewer tasks, or they would run if `srun` had started them.
    """
    if TorchElasticEnvironment.detect() or not SLURMEnvironment.detect():
        return
    tasks = int(os.environ["SLURM_NTASKS"])
    if tasks == devices * nodes and (tasks == 1 or "SLURM_STEP_ID" in os.environ):  # which only srun sets
        return
    if not is_first_process():
        sys.exit(1)
    if tasks != devices * nodes:
        raise UserError(
            f"Slurm has {tasks} task(s) (SLURM_NTASKS), but trainer.devices={devices} on trainer.num_nodes={nodes}"
            f" need {devices * nodes}, one for each device: change one or the other (see scripts/slurm.sh)"
        )
    raise UserError(f"Slurm has {tasks} tasks, but only one process: put srun before python (see scripts/slurm.sh)")

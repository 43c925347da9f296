"""How `trainer=ddp` starts its ranks."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from lightning import Trainer
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from ldm_lab.training.watch import Watch

PARENT = "LDM_LAB_LAUNCHER"  # the variable that tells launched processes which one has launched them


class Launcher(_SubprocessScriptLauncher):
    """Starts the ranks as Lightning does; each of them has a `Watch`.

    Lightning's own observer kills the launching process, too, so that nobody says what has happened, and where the
    launching process is the one to die, the others are left to themselves.
    """

    def launch(self, function: Callable, *args: Any, trainer: Trainer | None = None, **kwargs: Any) -> Any:  # noqa: ANN401
        """Start the other ranks, unless something else has or they are there since an earlier stage; then call."""
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
    """The process without which this one has no purpose: the launching rank, or torchrun's agent."""
    if TorchElasticEnvironment.detect():
        return os.getppid()
    launcher = int(os.environ.get(PARENT, os.getpid()))
    return launcher if launcher != os.getpid() else None

"""Starts the ranks of `trainer=ddp`."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from lightning import Trainer
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from ldm_lab.training.watch import Watch

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

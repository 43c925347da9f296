"""How the threads of one process wait for each other."""

from __future__ import annotations

import os

KNOWN = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # variables with which a user decides


def wait_asleep() -> None:
    """Let OpenMP's threads sleep while they wait, unless the environment says how to wait.

    By default they spin. Where another process takes a core, one thread then spins for as long as the other is not
    scheduled, at every parallel operation. Steps of the demo's stage 1 on two cores, images a second: on a quiet
    machine 20 spinning and 20 asleep; beside one busy process 6 spinning, 14 asleep (13 with a single thread).

    OpenMP reads the variable when torch is loaded: the entries call this before they import torch. Processes that
    are started later inherit the variable.
    """
    if not any(name in os.environ for name in KNOWN):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

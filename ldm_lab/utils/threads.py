"""Sets how OpenMP threads wait."""

from __future__ import annotations

import os

KNOWN = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # environment variables of the user's choice


def wait_asleep() -> None:
    """Let waiting OpenMP threads sleep, unless the user has set an environment variable for it.

    By default they spin. If another process takes a core, then at every parallel operation one thread spins until the
    other thread is scheduled. The demo's stage 1 on two cores, images per second: on a quiet machine 20 spinning and
    20 asleep; beside one busy process 6 spinning, 14 asleep (13 with a single thread).

    OpenMP reads the variable when torch is loaded, so the entry points call this before they import torch. Child
    processes inherit the variable.
    """
    if not any(name in os.environ for name in KNOWN):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

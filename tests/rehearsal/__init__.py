"""Everything that trains or draws, on a device that is not the CPU: see `device`, `rules` and `accelerator`."""

from dataclasses import dataclass

import torch

from tests.rehearsal.rules import Log


@dataclass
class Rehearsal:
    """What the fixture `rehearsal` gives.

    Attributes:
        device: to be used like any other.
        log: what has happened there since the test began.
    """

    device: torch.device
    log: Log

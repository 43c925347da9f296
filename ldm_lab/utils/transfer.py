"""Copies to a device that its host does not wait for."""

from __future__ import annotations

import torch
from torch import Tensor

UNPINNED = ("cpu", "mps", "meta")  # devices that fetch nothing from pinned memory by themselves


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor on `device`: itself where it is there, else a copy, from pinned memory where that is of the CPU.

    For a copy from other memory the host waits until all that the device has been given before is done.
    """
    device = torch.device(device)
    if tensor.device.type != "cpu" or device.type in UNPINNED:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)

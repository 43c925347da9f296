"""Asynchronous copies to a device."""

from __future__ import annotations

import torch
from torch import Tensor

UNPINNED = ("cpu", "mps", "meta")  # devices without asynchronous copies from pinned memory


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Move a tensor to `device`; copies CPU tensors from pinned memory, so that the host does not wait.

    For a copy from pageable memory the host waits until the device has done all earlier work.
    """
    device = torch.device(device)
    if tensor.device.type != "cpu" or device.type in UNPINNED:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)

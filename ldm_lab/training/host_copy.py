"""A copy of the training state in host memory, to write while training goes on."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from ldm_lab.training.planning import memory


class HostCopy:
    """Copies training states to host memory, always into the same buffers."""

    def __init__(self) -> None:
        self._buffers: dict[tuple, Tensor] = {}

    def fits(self, state: dict[str, Any]) -> bool:
        """Whether host memory has room for the copy."""
        more = memory.num_bytes(state) - memory.num_bytes(self._buffers)
        return more <= 0 or more <= memory.budget(torch.device("cpu"))

    @torch.no_grad()
    def take(self, state: dict[str, Any]) -> dict[str, Any]:
        """Copy the state, its tensors and their containers. The next copy overwrites this one."""
        found = {(n, tensor.shape, tensor.dtype): tensor for n, tensor in enumerate(memory.tensors(state))}
        self._buffers = {key: self._buffer(key, tensor) for key, tensor in found.items()}
        for key, tensor in found.items():
            self._buffers[key].copy_(tensor)
        # deepcopy takes objects in its memo as copied already.
        return copy.deepcopy(state, {id(tensor): self._buffers[key] for key, tensor in found.items()})

    def _buffer(self, key: tuple, tensor: Tensor) -> Tensor:
        return self._buffers[key] if key in self._buffers else torch.empty_like(tensor, device="cpu")

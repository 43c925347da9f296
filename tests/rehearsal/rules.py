"""What a device is not like a CPU in, checked operation by operation.

1. Nothing mixes devices: it raises as CUDA does.
2. Whoever asks for a value, or copies between pageable memory and the device, waits for it: `Log.waits` says who.
3. There is no float64: making it raises as Apple's device does.
"""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor

import ldm_lab

NAMES = {"": ldm_lab, "lightning/": lightning}  # how `Wait.places` names files
PACKAGES = {f"{Path(package.__file__).parent}/": prefix for prefix, package in NAMES.items()}
aten = torch.ops.aten

VALUES = {  # results whose value, or whose size, the host must know
    "_local_scalar_dense", "nonzero", "masked_select", "equal", "bincount", "unique_consecutive", "_unique2", "_unique",
    "unique_dim", "linalg_eigh", "_linalg_eigh", "is_nonzero",
}  # fmt: skip
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
COPIES = {"copy_", "_to_copy", "_copy_from"}
ANY_SCALAR = {"where", "fill_", "fill", "masked_fill", "masked_fill_"} | COPIES  # take 0-dim tensors of the CPU
NO_FLOAT64 = {torch.float64, torch.complex128}


@dataclass(frozen=True)
class Wait:
    """The host has waited for the device.

    Attributes:
        what: the operation.
        places: who was at work, the innermost first: `file: function` below `ldm_lab/`, or of Lightning.
    """

    what: str
    places: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.what} in {' < '.join(self.places) or 'nothing of ours'}"


@dataclass
class Log:
    """What has happened on the device."""

    waits: list[Wait] = field(default_factory=list)
    operations: set[str] = field(default_factory=set)
    pinned: dict[int, Tensor] = field(default_factory=dict)  # by storage; they stay, so that no number comes twice

    def clear(self) -> None:
        """Forget all but the pinned memory."""
        self.waits.clear()
        self.operations.clear()

    def pin(self, tensor: Tensor, device: object = None) -> Tensor:
        """In the place of `Tensor.pin_memory`: a copy that the device can fetch by itself."""
        copy = tensor.clone()
        self.pinned[copy.untyped_storage()._cdata] = copy
        return copy

    def wait(self, what: str) -> None:
        """Take note."""
        self.waits.append(Wait(what, places()))


LOG = Log()


def places() -> tuple[str, ...]:
    """The functions of ours and of Lightning that are at work, the innermost first."""
    found, frame = [], sys._getframe(1)
    while frame is not None:
        if file := below(frame.f_code.co_filename):
            found.append(f"{file}: {frame.f_code.co_name}")
        frame = frame.f_back
    return tuple(dict.fromkeys(found))


@functools.cache
def below(path: str) -> str | None:
    """A file of ours or of Lightning, as `Wait.places` names it."""
    found = (prefix + path.removeprefix(folder) for folder, prefix in PACKAGES.items() if path.startswith(folder))
    return next(found, None)


def no_float64(dtype: torch.dtype) -> None:
    """Rule 3."""
    if dtype in NO_FLOAT64:
        raise TypeError(f"Cannot convert a tensor to {dtype}: the device has no float64 (rule 3 of the rehearsal)")


def check(func: Any, args: tuple, kwargs: dict[str, Any], tensors: list[Tensor], to_host: bool) -> None:
    """Rules 1 and 2, and take note. `to_host`: the operation asks for a result on the CPU."""
    name = func._schema.name.removeprefix("aten::")
    here = [tensor for tensor in tensors if tensor.device.type != "cpu"]
    if here and not to_host:
        LOG.operations.add(str(func))
    mixed = len(here) < len(tensors)
    if here and mixed and not may_mix(func, name, args, tensors):
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices,"
            f" {here[0].device} and cpu! (in {func}; rule 1 of the rehearsal)"
        )
    if name in COPIES:
        _check_copy(name, args, kwargs, to_host)
    elif here and (name in VALUES or (name == "repeat_interleave" and kwargs.get("output_size") is None)):
        LOG.wait(name)
    elif name in INDEXING and here:
        _check_indices(name, args)


def may_mix(func: Any, name: str, args: tuple, tensors: list[Tensor]) -> bool:
    """Whether CUDA lets tensors of the CPU take part."""
    cpu = [tensor for tensor in tensors if tensor.device.type == "cpu"]
    if name in COPIES:
        return True
    if name in INDEXING:  # indices may lie on the CPU, and a single value; what is indexed may not
        return args[0].device.type != "cpu" and (len(args) < 3 or args[2].device.type != "cpu" or args[2].dim() == 0)
    scalars = all(tensor.dim() == 0 for tensor in cpu)
    pointwise = torch.Tag.pointwise in func.tags and not name.startswith("_foreach")
    own = isinstance(args[0], Tensor) and args[0].device.type == "cpu" and name.endswith("_")  # changed in place
    return scalars and (pointwise or name in ANY_SCALAR) and not own


def _check_copy(name: str, args: tuple, kwargs: dict[str, Any], to_host: bool) -> None:
    """Of the device to the host: a wait, unless it need not be there yet. The other way: of pageable memory."""
    positional = args[2] if name == "copy_" and len(args) > 2 else False
    non_blocking = bool(kwargs.get("non_blocking", positional))
    source, target = (args[1], args[0]) if name == "copy_" else (args[0], None)
    from_cpu = source.device.type == "cpu"
    to_cpu = to_host if target is None else target.device.type == "cpu"
    if to_cpu and not from_cpu and not non_blocking:
        LOG.wait("copy to the host")
    if from_cpu and not to_cpu and not (non_blocking and source.untyped_storage()._cdata in LOG.pinned):
        LOG.wait("copy from the host")


def _check_indices(name: str, args: tuple) -> None:
    """Masks have as many places as they have; indices of the CPU are copied."""
    indices = [index for index in args[1] if index is not None]
    single = len(args) > 2 and args[2].numel() == 1  # a masked fill
    if any(index.dtype in (torch.bool, torch.uint8) for index in indices) and not single:
        LOG.wait("index by a mask")
    if any(index.device.type == "cpu" for index in indices):
        LOG.wait("index from the host")

"""A second device for machines that have none: its tensors hold a tensor of the CPU and compute with that, by rules.

torch lets Python register the device that it keeps for others ("PrivateUse1"). That is for good in a process and
changes what `torch.accelerator` says: `tests/conftest.py` lets the tests that use it come last.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import return_and_correct_aliasing

from tests.rehearsal import rules

NAME = "rehearsal"
SETUP = "_setup_privateuseone_for_python_backend"  # not every torch has it
COMPOSED = torch._C.DispatchKey.CompositeImplicitAutograd
AVAILABLE = hasattr(backend_registration, SETUP)


class Module:
    """What torch asks of a device's module, `torch.rehearsal`."""

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        """Its random numbers are the CPU's."""

    def get_rng_state(self, device: object = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: object = None) -> None:
        """They are set as the CPU's."""

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


class DeviceTensor(torch.Tensor):
    """A tensor of the device. Attributes: host: its values."""

    host: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, host: Tensor) -> DeviceTensor:
        rules.no_float64(host.dtype)
        made = torch.Tensor._make_wrapper_subclass(
            cls, host.size(), strides=host.stride(), storage_offset=host.storage_offset(), dtype=host.dtype,
            layout=host.layout, device=torch.device(NAME, 0),
        )  # fmt: skip
        made.host = host
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if composed(func):  # inference mode does not take these apart by itself
            return func._op_dk(COMPOSED, *args, **(kwargs or {}))
        return execute(func, args, kwargs or {})

    def __repr__(self, **_: Any) -> str:
        return f"DeviceTensor({self.host})"

    def tolist(self) -> Any:
        return self.cpu().tolist()  # torch's own takes no subclasses


def execute(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """One operation: check it, do it with the values, and wrap what comes out where it belongs to the device."""
    device = kwargs.get("device")
    on_device = device is None or torch.device(device).type == NAME
    tensors: list[Tensor] = []
    hosts, options = unwrapped(args, tensors), unwrapped(kwargs, tensors)
    rules.check(func, args, kwargs, tensors, to_host=not on_device)
    if device is not None:
        options["device"] = torch.device("cpu") if on_device else device
    out = func(*hosts, **options)
    if func is torch.ops.aten.copy_.default:
        return args[0]
    if func is torch.ops.aten._to_copy.default and out is hosts[0]:
        out = out.clone()
    if not on_device or not any(isinstance(tensor, DeviceTensor) for tensor in tensors):
        return out
    return return_and_correct_aliasing(func, args, kwargs, wrapped(out)) if aliases(func) else wrapped(out)


def unwrapped(tree: Any, found: list[Tensor]) -> Any:
    """Arguments with the values in the place of the device's tensors; all tensors are added to `found`."""
    if isinstance(tree, Tensor):
        found.append(tree)
        return tree.host if isinstance(tree, DeviceTensor) else tree
    if isinstance(tree, dict):
        return {key: unwrapped(part, found) for key, part in tree.items()}
    return type(tree)(unwrapped(part, found) for part in tree) if type(tree) in (tuple, list) else tree


def wrapped(tree: Any) -> Any:
    """Results, as tensors of the device."""
    if isinstance(tree, Tensor):
        return DeviceTensor(tree)
    return type(tree)(wrapped(part) for part in tree) if type(tree) in (tuple, list) else tree


@functools.cache
def composed(func: Any) -> bool:
    """Whether an operation is made of others."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), COMPOSED)


@functools.cache
def aliases(func: Any) -> bool:
    """Whether a result of the operation shares memory with an argument."""
    return any(result.alias_info is not None for result in func._schema.returns)


def empty(
    size: Any, *, dtype: Any = None, layout: Any = None, device: Any = None, pin_memory: Any = None,
    memory_format: Any = None,
) -> DeviceTensor:  # fmt: skip
    """Where every other factory function begins."""
    return DeviceTensor(torch.empty(size, dtype=dtype, memory_format=memory_format or torch.contiguous_format))


def empty_strided(
    size: Any, stride: Any, *, dtype: Any = None, layout: Any = None, device: Any = None, pin_memory: Any = None
) -> DeviceTensor:
    """The same with strides."""
    return DeviceTensor(torch.empty_strided(size, stride, dtype=dtype))


def copy_from(source: Tensor, target: DeviceTensor, non_blocking: bool = False) -> Tensor:
    """What `torch.tensor(numbers, device=...)` ends with, past `__torch_dispatch__`."""
    return execute(torch.ops.aten.copy_.default, (target, source, non_blocking), {})


@functools.cache
def register() -> torch.device:
    """Make the device, once for this process."""
    getattr(backend_registration, SETUP)(NAME, Module())
    library = torch.library.Library("aten", "IMPL")
    library.impl("empty.memory_format", empty, "PrivateUse1")
    library.impl("empty_strided", empty_strided, "PrivateUse1")
    library.impl("_copy_from", copy_from, "PrivateUse1")
    register.library = library  # what it registers lasts as long as it does
    return torch.device(NAME, 0)

"""Free, total and peak memory of a device, and errors that say that memory is full."""

from __future__ import annotations

import contextlib
import gc
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.memory import is_oom_error
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ldm_lab.data.datamodule import ImageDataModule
from ldm_lab.data.sampler import divisors
from ldm_lab.training.stage_module import StageModule
from ldm_lab.utils.errors import UserError, one_line

UNITS = {"GB": 2**30, "MB": 2**20, "kB": 2**10}  # binary units, as GPU vendors use

# Usable fraction of free memory: the rest is for fragmentation, and on a CPU for loaders and other programs.
MARGIN_CUDA, MARGIN_CPU = 0.9, 0.8


def budget(device: torch.device) -> int:
    """Bytes that training may use: the free memory less a margin."""
    return int((MARGIN_CUDA if device.type == "cuda" else MARGIN_CPU) * free(device))


def free(device: torch.device) -> int:
    """Free bytes of a GPU, or of the machine's memory within the limit of its control group."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    machine = _kilobytes("/proc/meminfo", "MemAvailable")
    # If the system does not report free memory (macOS), half of the total.
    return min(machine or total(device) // 2, group_limit())


def total(device: torch.device) -> int:
    """Total bytes of the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def reset_peak(device: torch.device) -> None:
    """Restart the measurement of `peak`."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):  # only Linux can; elsewhere the peak covers the whole life of the process
        Path("/proc/self/clear_refs").write_text("5")


def peak(device: torch.device) -> int:
    """Peak bytes in use since `reset_peak`: on a GPU by tensors, on a CPU by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if found := _kilobytes("/proc/self/status", "VmHWM"):
        return found
    import resource  # missing on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def num_bytes(tree: Any) -> int:  # noqa: ANN401
    """Bytes of the tensors in nested data."""
    return sum(tensor.nbytes for tensor in tensors(tree))


def tensors(tree: Any) -> list[Tensor]:  # noqa: ANN401
    """The tensors in nested data."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def readable(size: float) -> str:
    """A number of bytes with its unit: `19.2 GB`, `640 MB`, `2 kB`."""
    unit, length = next(((u, n) for u, n in UNITS.items() if size >= n), ("B", 1))
    return f"{size / length:,.0f} {unit}" if size >= 100 * length else f"{size / length:.3g} {unit}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that a device is out of memory."""
    allocator = isinstance(error, RuntimeError) and "you tried to allocate" in str(error)  # the CPU allocator's message
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or allocator or is_oom_error(error)


@contextlib.contextmanager
def explained(module: StageModule, data: ImageDataModule, world_size: int) -> Iterator[None]:
    """Context of training: turns an out-of-memory error into a `UserError` that names the setting to lower."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        advice = _what_to_lower(module, data, world_size)
        raise UserError(f"out of memory in stage {module.stage}: {advice} ({one_line(error)[:120]} ...)") from error


def _what_to_lower(module: StageModule, data: ImageDataModule, world_size: int) -> str:
    """The key, its value and a better value: at most half as many images, a number that divides the batch."""
    size = data.device_batch_size(world_size)
    if not module.training and (data.val_batch_size or size) > 1:  # it failed in validation
        size = data.val_batch_size or size
        return f"data.val_batch_size={size} is too much for the device: use {size // 2}"
    if size > 1:
        smaller = max(n for n in divisors(data.global_batch_size // world_size) if n <= size // 2)
        return f"data.batch_size={size} is too much for the device: use {smaller}, or auto; the steps stay the same"
    height, width = data.image_size
    return (
        f"data.image_size=[{height},{width}], even with data.batch_size=1: lower it, or choose smaller networks, model="
    )


def _kilobytes(path: str, key: str) -> int:
    """The bytes of a line `key: 123 kB`; 0 without such a line."""
    with contextlib.suppress(OSError):
        if found := re.search(rf"^{key}:\s+(\d+) kB", Path(path).read_text(), re.MULTILINE):
            return 1024 * int(found[1])
    return 0


def group_limit(root: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that a container or Slurm job (cgroup v2) leaves to this process; a huge number without a limit."""
    with contextlib.suppress(OSError, ValueError):
        limit = int((root / "memory.max").read_text())  # "max": no limit
        cache = re.search(r"^inactive_file (\d+)", (root / "memory.stat").read_text(), re.MULTILINE)
        return limit - int((root / "memory.current").read_text()) + int(cache[1] if cache else 0)
    return sys.maxsize

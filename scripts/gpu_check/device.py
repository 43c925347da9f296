"""The device of a check: which one, what it is fast at, and the settings of every training on it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from ldm_lab.utils.errors import UserError
from scripts.gpu_check.runner import Check

if TYPE_CHECKING:
    import torch


def torch_device(check: Check) -> torch.device:
    """Where everything runs. Raises `ValueError` where there is no such device."""
    import torch

    if check.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: there is no GPU that this torch can use; --device cpu --small tries the parts")
    return torch.device(check.device)


def dtypes(check: Check) -> tuple[str, ...]:
    """The types of numbers that the device is fast at."""
    import torch

    fast = check.device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return ("float32", "bfloat16") if fast else ("float32",)


def trainer(check: Check) -> str:
    """The option of configs/trainer."""
    return "gpu" if check.device == "cuda" else "cpu"


def everyday(check: Check) -> list[str]:
    """Settings of every training: the device, and nothing is written outside the work."""
    folders = [f"paths.{name}={check.work / name}" for name in ("runs", "cache")]
    return [f"trainer={trainer(check)}", "logger=csv", *folders]


def cores() -> int:
    """Those that this process may use, where the system says so."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

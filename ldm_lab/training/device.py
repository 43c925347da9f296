"""Resolves and checks the device and precision of training."""

from __future__ import annotations

import shutil
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.accelerators import (
    Accelerator,
    AcceleratorRegistry,
    CPUAccelerator,
    CUDAAccelerator,
    MPSAccelerator,
)
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from ldm_lab.models.layers.cpu import has_bfloat16
from ldm_lab.training.precisions import ALIASES
from ldm_lab.utils.errors import UserError

ROUNDED = {"bf16-true": torch.bfloat16, "16-true": torch.float16}  # precision of sampling -> dtype of the networks


def resolve_precision(precision: str | int | None, accelerator: str) -> str:
    """`auto` -> bf16-mixed if the device is fast at bfloat16, else 32-true; other values -> Lightning's long form."""
    if precision is None:
        return "32-true"
    if precision != "auto":
        return ALIASES.get(str(precision), str(precision))
    kind = device_type(accelerator)
    if kind == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = kind == "cpu" and has_bfloat16()
    return "bf16-mixed" if fast else "32-true"


def precision_of(trainer: Trainer) -> torch.autocast:
    """Autocast context for networks that a callback runs: bfloat16 in bf16-mixed training, else float32."""
    return torch.autocast(trainer.strategy.root_device.type, torch.bfloat16, enabled=trainer.precision == "bf16-mixed")


def device_type(accelerator: str) -> str:
    """The torch device type for `trainer.accelerator`; `auto` is a GPU (CUDA or Apple's MPS) if there is one.

    `tests/rehearsal` checks that MPS has a kernel for every operation of training and sampling.
    """
    if accelerator not in ("auto", "gpu"):
        return accelerator
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def check(settings: dict[str, Any]) -> None:
    """Reject trainer settings that this machine cannot run, before any data is read.

    Args:
        settings: `trainer` of a config, as plain data; entries that describe objects are not checked.

    Raises:
        UserError: no such device, too few devices, no such strategy, or the device does not support the precision.
    """
    accelerator, devices = settings.get("accelerator", "auto"), settings.get("devices", "auto")
    strategy, precision = settings.get("strategy", "auto"), settings.get("precision", "auto")
    if not isinstance(strategy, dict) and str(strategy).lower() not in ("auto", *StrategyRegistry):
        raise UserError(f"trainer.strategy={strategy}: there is no such strategy; use trainer.strategy=auto or ddp")
    if isinstance(accelerator, dict):
        return
    kind = _kind(accelerator)
    if not kind.is_available():
        why = f" ({_why_no_cuda()})" if shutil.which("nvidia-smi") else ""
        raise UserError(f"trainer.accelerator={accelerator}: no such device here{why}; use trainer.accelerator=cpu")
    if not _are_there(devices, kind):
        raise UserError(f"trainer.devices={devices}: {_how_many(kind)}")
    if kind is CPUAccelerator and resolve_precision(precision, "cpu") == "16-mixed":
        raise UserError(
            f"trainer.precision={precision}: needs a GPU; use trainer.precision=bf16-mixed or 32-true on a CPU"
        )


def _kind(accelerator: object) -> type[Accelerator]:
    """Lightning's accelerator class; `auto` and `gpu` as Lightning chooses. Raises `UserError` if unknown."""
    if str(accelerator) in AcceleratorRegistry.available_accelerators():
        return AcceleratorRegistry[accelerator]["accelerator"]
    if accelerator not in ("auto", "gpu"):
        what = "there is no such kind of device; use trainer.accelerator=auto, cpu or gpu"
        raise UserError(f"trainer.accelerator={accelerator}: {what}")
    there = [kind for kind in (MPSAccelerator, CUDAAccelerator) if kind.is_available()]
    return next(iter(there), CPUAccelerator if accelerator == "auto" else CUDAAccelerator)


def _are_there(devices: object, kind: type[Accelerator]) -> bool:
    """Whether `trainer.devices` names devices of this machine."""
    if devices == "auto":
        return True
    try:
        return devices not in (0, "0", []) and not isinstance(devices, bool) and bool(kind.parse_devices(devices))
    except (MisconfigurationException, TypeError, ValueError):  # Lightning raises any of these
        return False


def _how_many(kind: type[Accelerator]) -> str:
    if kind is CPUAccelerator:
        return "use trainer.devices=1, or another number of processes, 1 or more"
    count = kind.auto_device_count()
    return f"this machine has {count}; use trainer.devices=auto, a number up to {count}, or a list such as [0]"


def describe(trainer: Trainer) -> str:
    """One line on devices and precision; on a CPU with an unused NVIDIA card, also why the card is unused."""
    device = trainer.strategy.root_device
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{torch.get_num_threads()} CPU threads" if device.type == "cpu" else device.type
    line = f"{trainer.world_size} x {name}, {trainer.precision}"
    if device.type == "cpu" and shutil.which("nvidia-smi"):
        line += f". There is an NVIDIA card that is not used: {_why_no_cuda()}"
    return line


def _why_no_cuda() -> str:
    if torch.cuda.is_available():
        return "trainer.accelerator asks for the CPU"
    if torch.version.cuda is None:
        return "this torch is built without CUDA; install one with CUDA"
    return f"torch {torch.__version__} needs a driver for CUDA {torch.version.cuda}; see nvidia-smi"

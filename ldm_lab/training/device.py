"""Which device a training runs on, why, and in which precision."""

from __future__ import annotations

import shutil

import torch
from lightning import Trainer

from ldm_lab.nn.cpu import has_bfloat16


def resolve_precision(precision: str | int, accelerator: str) -> str | int:
    """`auto` -> bf16-mixed where the device is fast at bfloat16, else 32-true; anything else stays."""
    if precision != "auto":
        return precision
    kind = device_type(accelerator)
    if kind == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = kind == "cpu" and has_bfloat16()
    return "bf16-mixed" if fast else "32-true"


def device_type(accelerator: str) -> str:
    """What `trainer.accelerator` stands for on this machine: `auto` is a GPU where there is one, Apple's too.

    `tests/rehearsal` checks that Apple's has a kernel for all that training and sampling do.
    """
    if accelerator not in ("auto", "gpu"):
        return accelerator
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def describe(trainer: Trainer) -> str:
    """One line: where it runs; and, on a CPU beside an NVIDIA card, why not there."""
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

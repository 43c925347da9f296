"""Selects the CPUs on which layers use our own faster algorithms instead of torch's kernels."""

from __future__ import annotations

import torch
from torch import Tensor

MEASURED = ("AVX2", "AVX512")  # instruction sets of measured CPUs, see docs/performance.md


def has_bfloat16() -> bool:
    """Whether the CPU has bfloat16 multiplication; emulation runs at a hundredth of the speed."""
    # torch 2.10 lacks the public `torch.cpu.get_capabilities` of 2.11.
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def takes_own_way(x: Tensor, weight: Tensor, *dtypes: torch.dtype) -> bool:
    """Whether a layer runs eagerly on a measured kind of CPU, in one of `dtypes`.

    GPUs, Apple's devices, compiled networks and other CPUs use torch's kernels, which are fast there, or whose
    alternatives are not measured. (AMD's transposed convolutions were reported 19.6 times slower than NVIDIA's.)

    Args:
        x: the input.
        weight: weight of the layer.
        dtypes: dtypes in which our algorithm was measured.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    autocast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
    dtype = autocast or (x.dtype if x.dtype == weight.dtype else None)
    if dtype not in dtypes or (dtype == torch.bfloat16 and not has_bfloat16()):
        return False
    return torch.backends.cpu.get_cpu_capability() in MEASURED

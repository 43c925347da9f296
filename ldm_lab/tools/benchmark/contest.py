"""Interleaved timing: contestants take turns in one process, so that disturbances affect all of them."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from ldm_lab.models.layers.cpu import has_bfloat16
from ldm_lab.training.planning import memory
from ldm_lab.utils import float32

aten = torch.ops.aten
# PyTorch's FLOP counter only knows attention on GPUs.
CPU_ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)
    ),
}


@dataclass
class Contestant:
    """A function to time.

    Attributes:
        name: name in the table.
        run: one run; a returned tensor is compared with the other contestants' tensors.
        images: images per run; 0: not applicable.
        dtype: dtype of the computation; None: not applicable.
        compile: compiles the networks, on request.
        rest: seconds of each run outside of forward and backward, if `run` records them.
    """

    name: str
    run: Callable[[], Tensor | None]
    images: int = 0
    dtype: torch.dtype | None = None
    compile: Callable[[], object] | None = None
    rest: list[float] = field(default_factory=list)


@dataclass
class Timing:
    """Measurements of a contestant.

    Attributes:
        seconds: wall time of each run.
        cpu_seconds: CPU time of each run, of this process on all cores; less than wall time if others compute.
        flops: floating-point operations per run in products and convolutions; a multiply-add counts as two.
        peak: peak bytes in use; on a CPU by this process (with the other contestants' networks).
        grown: bytes that the first run added to the memory in use.
        output: output of the last run; on CUDA of a further run without TF32.
    """

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    flops: int = 0
    peak: int = 0
    grown: int = 0
    output: Tensor | None = None

    @property
    def median(self) -> float:
        """Median seconds."""
        return statistics.median(self.seconds)


def measure(contestants: Sequence[Contestant], rounds: int, device: torch.device, compiled: bool) -> list[Timing]:
    """Time all contestants in turn, `rounds` times, after an untimed first run that counts operations.

    Args:
        contestants: the contestants.
        rounds: timed runs of each contestant.
        device: device of the computation.
        compiled: whether to compile the networks before timing.
    """
    timings = [Timing() for _ in contestants]
    for contestant, timing in zip(contestants, timings, strict=True):
        with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
            timing.grown = _grown(contestant, device)
        timing.flops = counter.get_total_flops()
        if compiled and contestant.compile:
            contestant.compile()
            contestant.run()
            timing.grown = _grown(contestant, device)
        contestant.rest.clear()
    for _ in range(rounds):
        for contestant, timing in zip(contestants, timings, strict=True):
            _run_once(contestant, timing, device)
    for contestant, timing in zip(contestants, timings, strict=True):
        if device.type == "cuda" and timing.output is not None:  # compare outputs without TF32
            with float32.exact():
                timing.output = contestant.run()
    return timings


def _run_once(contestant: Contestant, timing: Timing, device: torch.device) -> None:
    memory.reset_peak(device)
    start, cpu_start = time.perf_counter(), time.process_time()
    timing.output = contestant.run()
    synchronize(device)
    timing.seconds.append(time.perf_counter() - start)
    timing.cpu_seconds.append(time.process_time() - cpu_start)
    timing.peak = max(timing.peak, memory.peak(device))


def _grown(contestant: Contestant, device: torch.device) -> int:
    """Bytes that a run adds; an untimed run, as it first returns the process's free memory to the system."""
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)
    memory.reset_peak(device)
    before = memory.peak(device)
    contestant.run()
    synchronize(device)
    return memory.peak(device) - before


def synchronize(device: torch.device) -> None:
    """Wait for a GPU, as its kernels run asynchronously."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def is_emulated(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the device emulates this dtype, as a CPU without bfloat16 instructions does."""
    return device.type == "cpu" and dtype is torch.bfloat16 and not has_bfloat16()


@functools.cache
def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a product of two square matrices (larger on fast devices): the best of five."""
    side = 8192 if device.type == "cuda" else 256 if is_emulated(device, dtype) else 2048
    a = torch.randn(side, side, device=device, dtype=dtype)
    product = Contestant("matmul", lambda: a @ a)
    timing = Timing()
    for _ in range(6):  # the first is a warm-up
        _run_once(product, timing, device)
    return 2 * side**3 / min(timing.seconds)


def row(contestant: Contestant, timing: Timing, peak: float) -> dict[str, Any]:
    """A table row; `peak` is the machine's FLOP/s."""
    rate = timing.flops / timing.median
    found = {
        "name": contestant.name,
        "ms": 1000 * timing.median,
        "ms_min": 1000 * min(timing.seconds),
        "cpu_ms": 1000 * statistics.median(timing.cpu_seconds),
        "images_per_s": contestant.images / timing.median if contestant.images else None,
        "gflops": rate / 1e9 if timing.flops else None,
        "share_of_peak": rate / peak if timing.flops else None,
        "peak_bytes": timing.peak,
        "grown_bytes": timing.grown,
        "mb_per_image": timing.grown / 2**20 / contestant.images if contestant.images else None,
        "seconds": timing.seconds,
    }
    if contestant.rest:
        work = [whole - rest for whole, rest in zip(timing.seconds, contestant.rest, strict=True)]
        found["overhead"] = statistics.median(contestant.rest) / statistics.median(work)
    return found


def compare(own: Timing, peer: Timing, own_images: int = 1, peer_images: int = 1) -> dict[str, Any]:
    """Speed-up of `own` per image: ratio of medians, quartiles of the rounds' ratios, distance of the outputs.

    The distance is the maximum difference of the tensors, absolute and relative to the peer's maximum value.
    """
    each = [peers / ours * own_images / peer_images for ours, peers in zip(own.seconds, peer.seconds, strict=True)]
    low, _, high = statistics.quantiles(each, n=4, method="inclusive") if len(each) > 1 else each * 3
    found = {"ratio": peer.median / own.median * own_images / peer_images, "quartiles": [low, high]}
    if own.output is not None and peer.output is not None:
        ours, peers = own.output.double().cpu(), peer.output.double().cpu()
        off = (ours - peers).abs().max().item()
        found |= {"largest_difference": off, "relative": off / peers.abs().max().item()}
    return found

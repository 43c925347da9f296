"""Networks that are compiled: in place for inference, so that their state dicts keep their keys, or in a wrapper."""

from __future__ import annotations

from typing import Any

from torch import nn


def compile_for_inference(network: nn.Module, graphs: bool = False) -> None:
    """Let the calls of a network go through `torch.compile`; it is compiled when called, once for each shape.

    On a CPU its weights become constants of the code, most of them packed as the kernels want them: calls under
    `torch.no_grad` see what changes them in place afterwards (an optimizer's step, `load_state_dict`) in part or not at
    all. Replacing them, as `network.to(dtype)` does, compiles again.

    Args:
        network: on the device where it is to run.
        graphs: on a GPU, launch its kernels as one CUDA graph. What it returns is overwritten by the next call.
    """
    on_cpu = next(network.parameters()).device.type == "cpu"
    network.compile(dynamic=False, mode="reduce-overhead" if graphs and not on_cpu else None)
    if on_cpu:
        _freeze(network)


def _freeze(network: nn.Module) -> None:
    """`compile(options={"freezing": True})` is not enough: tracing looks at the setting of the whole process."""
    from torch._inductor import config

    compiled = network._compiled_call_impl

    def call(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        with config.patch(freezing=True):  # of nothing but this call, which may be the one that compiles
            return compiled(*args, **kwargs)

    network._compiled_call_impl = call


def unwrapped(part: Any) -> Any:  # noqa: ANN401
    """The network inside the wrappers of `torch.compile`, `DataParallel` and `DistributedDataParallel`."""
    while True:
        if isinstance(part, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            part = part.module
        elif hasattr(part, "_orig_mod"):
            part = part._orig_mod
        else:
            return part

"""Compiles networks in place for inference, so that state dicts keep their keys; unwraps compiled networks."""

from __future__ import annotations

from typing import Any

from torch import nn


def compile_for_inference(network: nn.Module, graphs: bool = False) -> None:
    """Compile a network with `torch.compile`, on its first call for each input shape.

    On a CPU the weights become constants of the compiled code, most of them in packed layouts: calls under
    `torch.no_grad` miss all or part of later in-place changes (an optimizer's step, `load_state_dict`). Replacing the
    weights, as `network.to(dtype)` does, compiles again.

    Args:
        network: the network on its final device.
        graphs: on a GPU, launch the kernels as one CUDA graph. The next call overwrites the output of this one.
    """
    on_cpu = next(network.parameters()).device.type == "cpu"
    network.compile(dynamic=False, mode="reduce-overhead" if graphs and not on_cpu else None)
    if on_cpu:
        _freeze(network)


def _freeze(network: nn.Module) -> None:
    """Set freezing for the whole process during a call, as tracing ignores `compile(options={"freezing": True})`."""
    from torch._inductor import config

    compiled = network._compiled_call_impl  # a hook of `nn.Module` would be compiled too

    def call(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        with config.patch(freezing=True):  # only in this call, which may compile
            return compiled(*args, **kwargs)

    network._compiled_call_impl = call


def unwrapped(part: Any) -> Any:  # noqa: ANN401
    """The network without wrappers of `torch.compile`, `DataParallel` and `DistributedDataParallel`."""
    while True:
        if isinstance(part, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            part = part.module
        elif hasattr(part, "_orig_mod"):  # torch has no public way back from `torch.compile`
            part = part._orig_mod
        else:
            return part

"""Memory layout of a network's weights, by device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from typing_extensions import Self


def memory_format(device: torch.device) -> torch.memory_format:
    """Channels innermost (`channels_last`) if every layer keeps this layout, else `contiguous_format`.

    A convolution's output has the layout of its weights, so the weights decide for all feature maps.

    - CPU: innermost, measured (docs/performance.md). The meta device too, as weights loaded into a network on
      meta come from the CPU.
    - CUDA: innermost from torch 2.15 on. Before, GroupNorm returned channels-outermost maps for channels-innermost
      maps (pytorch issue 111824, fixed by pull request 191945), and the next convolution converted each map back.
    - ROCm (its devices are called `cuda`), MPS and others: outermost, for which their libraries are tuned.
    """
    if device.type in ("cpu", "meta"):
        return torch.channels_last
    if device.type == "cuda" and torch.version.hip is None and torch.__version__ >= (2, 15):
        return torch.channels_last
    return torch.contiguous_format


class LaidOut(nn.Module):
    """A network that keeps the layout of `memory_format` on every device; its constructor must call `lay_out`.

    Parameters stay the same objects, so optimizers, DDP and compiled code still work. An optimizer that already has
    state needs `follow_parameters`.

    Attributes:
        layout: layout to use on every device instead; None: `memory_format` decides.
    """

    layout: torch.memory_format | None = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Hook of `to`, `cuda`, `float` and the like, for this network and for modules that contain it."""
        super()._apply(fn, recurse)
        self.lay_out()
        return self

    @torch.no_grad()
    def lay_out(self) -> None:
        """Convert weights, buffers and gradients to the layout of their device."""
        for tensor in (*self.parameters(), *self.buffers()):
            for one in (tensor, tensor.grad):
                if one is not None and one.ndim == 4:
                    _lay(one, self.layout or memory_format(one.device))


@torch.no_grad()
def follow_parameters(optimizer: torch.optim.Optimizer) -> None:
    """Convert an optimizer's state to the layout of its parameters, as a state from another device may differ.

    Fused optimizers iterate over memory addresses, so on a CPU they would silently mix up the numbers.
    """
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                state[key] = torch.empty_like(parameter, dtype=value.dtype, device=value.device).copy_(value)


def _lay(tensor: Tensor, layout: torch.memory_format) -> None:
    # Not `contiguous`: a 1x1 kernel is contiguous in both layouts, but its strides decide the layout of feature maps.
    laid = tensor.data.to(memory_format=layout)
    if laid.stride() != tensor.stride():
        tensor.data = laid

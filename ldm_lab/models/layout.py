"""In which order a network's weights lie in memory, by device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from typing_extensions import Self


def memory_format(device: torch.device) -> torch.memory_format:
    """Channels innermost (`channels_last`) where every layer keeps them so, else outermost (`contiguous_format`).

    A convolution's output lies as its weights do, so that the weights decide for all feature maps.

    - CPU: innermost, measured (docs/performance.md). So is the meta device: weights that are loaded into a network
      made there come from the CPU.
    - CUDA: innermost from torch 2.15 on. Before, GroupNorm returned channels-outermost maps for channels-innermost
      ones (pytorch issue 111824, mended by pull request 191945), and the next convolution turned each of them back.
    - ROCm (it calls its devices `cuda`), MPS and others: outermost, which their libraries are tuned for.
    """
    if device.type in ("cpu", "meta"):
        return torch.channels_last
    if device.type == "cuda" and torch.version.hip is None and torch.__version__ >= (2, 15):
        return torch.channels_last
    return torch.contiguous_format


class LaidOut(nn.Module):
    """A network whose weights lie as `memory_format` says, wherever it is moved to; its constructor calls `lay_out`.

    Parameters stay the objects they are: optimizers, DDP and compiled code go on. An optimizer that has state already
    needs `follow_parameters`.

    Attributes:
        layout: where the weights shall lie instead, on every device; None: as `memory_format` says.
    """

    layout: torch.memory_format | None = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What `to`, `cuda`, `float` and the like are made of, for this network and for those that contain it."""
        super()._apply(fn, recurse)
        self.lay_out()
        return self

    @torch.no_grad()
    def lay_out(self) -> None:
        """Lay weights, buffers and gradients out for the device they are on."""
        for tensor in (*self.parameters(), *self.buffers()):
            for one in (tensor, tensor.grad):
                if one is not None and one.ndim == 4:
                    _lay(one, self.layout or memory_format(one.device))


@torch.no_grad()
def follow_parameters(optimizer: torch.optim.Optimizer) -> None:
    """Lay an optimizer's state out as its parameters: one that was saved on another device may lie otherwise.

    Fused optimizers go through parameter and state by address: on a CPU they would mix the numbers up without a word.
    """
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                state[key] = torch.empty_like(parameter, dtype=value.dtype, device=value.device).copy_(value)


def _lay(tensor: Tensor, layout: torch.memory_format) -> None:
    # Not `contiguous`: for it a 1x1 kernel lies in both orders, but what decides over feature maps are its strides.
    laid = tensor.data.to(memory_format=layout)
    if laid.stride() != tensor.stride():
        tensor.data = laid

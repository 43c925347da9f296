"""Gradient checkpointing (Chen et al. 2016, arXiv 1604.06174): memory of a training step for time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Recomputed(nn.Module):
    """A block whose inner activations may be computed again in the backward pass instead of being kept.

    Attributes:
        recompute: whether they are; results and gradients are the same.
    """

    recompute = False

    def recomputed(self, compute: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
        """`compute(*inputs)`, of which the inputs alone are kept for the backward pass where `recompute` says so."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(compute, *inputs, use_reentrant=False)
        return compute(*inputs)


class GradientCheckpointing:
    """The switch, for a network made of such blocks."""

    def enable_gradient_checkpointing(self) -> None:
        """Compute the blocks' activations again in the backward pass: less memory, one more forward pass a step."""
        self._set_recompute(True)

    def disable_gradient_checkpointing(self) -> None:
        """Keep the activations for the backward pass, as at first."""
        self._set_recompute(False)

    def _set_recompute(self, recompute: bool) -> None:
        for module in self.modules():
            if isinstance(module, Recomputed):
                module.recompute = recompute

"""Gradient checkpointing (Chen et al. 2016, arXiv 1604.06174): less memory for more computation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Recomputed(nn.Module):
    """A block that can recompute its inner activations in the backward pass instead of storing them.

    Attributes:
        recompute: whether to recompute; results and gradients are the same.
    """

    recompute = False

    def recomputed(self, compute: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
        """`compute(*inputs)`; with `recompute`, only the inputs are stored for the backward pass."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(compute, *inputs, use_reentrant=False)
        return compute(*inputs)


class GradientCheckpointing:
    """Mixin that switches gradient checkpointing for all `Recomputed` blocks of a network."""

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward pass: less memory, one more forward pass per step."""
        self._set_recompute(True)

    def disable_gradient_checkpointing(self) -> None:
        """Store the activations for the backward pass (the default)."""
        self._set_recompute(False)

    def _set_recompute(self, recompute: bool) -> None:
        for module in self.modules():
            if isinstance(module, Recomputed):
                module.recompute = recompute

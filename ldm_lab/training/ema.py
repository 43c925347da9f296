"""The exponential moving average of a network's weights, which validation, previews and exports use."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ldm_lab.utils.errors import UserError


class EMA(nn.Module):
    """A frozen float32 copy of one network that follows it: θ̄ ← θ̄ + (1 - decay(n)) (θ - θ̄) at update n = 1, 2, ...

    The decay warms up as min(decay, (1 + n) / (10 + n)), so that the random initial weights are soon
    forgotten. Parameters are averaged; buffers are copied, because counters and schedules have no mean.
    An update is one pass over the weights, and the host does not wait for it.

    Attributes:
        model: the copy, in evaluation mode. As a submodule it moves and is saved with its owner.
        num_updates: updates so far, int64.

    Args:
        network: what to follow; it stays as it is.
        decay: upper end of the decay.
    """

    def __init__(self, network: nn.Module, decay: float = 0.9999) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise UserError(f"model.ema.decay={decay}: must be at least 0 and less than 1")
        self.max_decay = decay
        self.model = copy.deepcopy(network).float().eval().requires_grad_(False)
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))
        self._known_updates: int | None = 0  # spares asking the device; None: another count was loaded
        self.register_load_state_dict_post_hook(_forget_updates)

    def decay(self, n: int) -> float:
        """The decay at update n, which counts from 1."""
        return min(self.max_decay, (1 + n) / (10 + n))

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Move towards the weights of `network`; call it once per optimizer step.

        Raises:
            UserError: `network` has other parameters or buffers than the one this average was made of.
        """
        averages, values = _aligned(self.model.named_parameters(), network.named_parameters())
        before = int(self.num_updates) if self._known_updates is None else self._known_updates
        self._known_updates = before + 1
        self.num_updates += 1
        weight = 1 - self.decay(self._known_updates)
        torch._foreach_lerp_(averages, [value.to(mean) for mean, value in zip(averages, values, strict=True)], weight)
        copies, values = _aligned(self.model.named_buffers(), network.named_buffers())
        for copied, value in zip(copies, values, strict=True):
            copied.copy_(value)

    def train(self, mode: bool = True) -> EMA:
        """Set the mode of this module; the copy stays in evaluation mode, whatever its owner does."""
        super().train(mode)
        self.model.eval()
        return self


def _forget_updates(ema: EMA, _: object) -> None:
    ema._known_updates = None


def _aligned(
    mine: Iterable[tuple[str, Tensor]], theirs: Iterable[tuple[str, Tensor]]
) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors of both, in the same order. Raises `UserError` where the names differ."""
    mine, theirs = dict(mine), dict(theirs)
    if difference := sorted(mine.keys() ^ theirs.keys()):
        raise UserError(f"the EMA follows another network: {difference[0]!r} is in one of the two alone")
    return list(mine.values()), [theirs[name] for name in mine]

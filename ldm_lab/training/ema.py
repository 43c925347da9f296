"""Exponential moving average (EMA) of a network's weights; validation, previews and exports use it."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ldm_lab.utils.errors import UserError


class EMA(nn.Module):
    """A frozen float32 average of a network: θ̄ ← θ̄ + (1 - decay(n)) (θ - θ̄) at update n = 1, 2, ...

    The decay warms up as min(decay, (1 + n) / (10 + n)), so that the average soon forgets the random initial
    weights. Parameters are averaged; buffers are copied, because counters and schedules have no mean. An
    update is one pass over the weights, and the host does not wait for it.

    Attributes:
        model: the averaged network, in evaluation mode; a submodule, so it moves and is saved with its owner.
        num_updates: updates so far, int64.

    Args:
        network: the network to average; it is not changed.
        decay: maximum of the decay.
    """

    def __init__(self, network: nn.Module, decay: float = 0.9999) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise UserError(f"model.ema.decay={decay}: must be at least 0 and less than 1")
        self.max_decay = decay
        self.model = copy.deepcopy(network).float().eval().requires_grad_(False)
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))
        self._known_updates: int | None = 0  # avoids a read from the device; None: unknown after loading
        self.register_load_state_dict_post_hook(_forget_updates)

    def decay(self, n: int) -> float:
        """Decay at update n = 1, 2, ..."""
        return min(self.max_decay, (1 + n) / (10 + n))

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Move the average towards the weights of `network`; call once per optimizer step.

        Raises:
            UserError: `network` has other parameters or buffers than the averaged network.
        """
        averages, values = _aligned(self.model.named_parameters(), network.named_parameters())
        before = int(self.num_updates) if self._known_updates is None else self._known_updates
        self._known_updates = before + 1
        self.num_updates += 1
        values = [value.to(mean) for mean, value in zip(averages, values, strict=True)]
        get_ema_multi_avg_fn(self.decay(self._known_updates))(averages, values, self._known_updates)
        copies, values = _aligned(self.model.named_buffers(), network.named_buffers())
        for copied, value in zip(copies, values, strict=True):
            copied.copy_(value)

    def train(self, mode: bool = True) -> EMA:
        """Set the mode of this module; the averaged network always stays in evaluation mode."""
        super().train(mode)
        self.model.eval()
        return self


def _forget_updates(ema: EMA, _: object) -> None:
    ema._known_updates = None


def _aligned(
    averaged: Iterable[tuple[str, Tensor]], followed: Iterable[tuple[str, Tensor]]
) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors of both networks in the same order. Raises `UserError` if the names differ."""
    averaged, followed = dict(averaged), dict(followed)
    if difference := sorted(averaged.keys() ^ followed.keys()):
        raise UserError(f"the EMA follows another network: {difference[0]!r} is in one of the two alone")
    return list(averaged.values()), [followed[name] for name in averaged]

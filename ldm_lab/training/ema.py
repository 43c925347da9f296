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
        self.model = frozen_copy(network)
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))
        self._known_updates: int | None = 0  # avoids a read from the device; None: unknown after loading
        self.register_load_state_dict_post_hook(_forget_updates)

    def decay(self, n: int) -> float:
        """Decay at update n = 1, 2, ..."""
        return min(self.max_decay, (1 + n) / (10 + n))

    def update(self, network: nn.Module) -> None:
        """Move the average towards the weights of `network`; call once per optimizer step.

        Raises:
            UserError: `network` has other parameters or buffers than the averaged network.
        """
        before = int(self.num_updates) if self._known_updates is None else self._known_updates
        move(self.model, network, self.decay(before + 1))
        self._known_updates = before + 1
        self.num_updates += 1

    def train(self, mode: bool = True) -> EMA:
        """Set the mode of this module; the averaged network always stays in evaluation mode."""
        super().train(mode)
        self.model.eval()
        return self


def frozen_copy(network: nn.Module) -> nn.Module:
    """A float32 copy of a network in evaluation mode, without gradients."""
    return copy.deepcopy(network).float().eval().requires_grad_(False)


@torch.no_grad()
def move(average: nn.Module, network: nn.Module, decay: float) -> None:
    """Move the parameters of `average` towards those of `network`: θ̄ ← θ̄ + (1 - decay) (θ - θ̄); copy its buffers.

    Raises:
        UserError: `network` has other parameters or buffers than the average.
    """
    averages, values = _aligned(average.named_parameters(), network.named_parameters())
    values = [value.to(mean) for mean, value in zip(averages, values, strict=True)]
    get_ema_multi_avg_fn(decay)(averages, values, 0)
    copies, values = _aligned(average.named_buffers(), network.named_buffers())
    for copied, value in zip(copies, values, strict=True):
        copied.copy_(value)


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

"""Finds the largest batch size that fits a device: `data.batch_size=auto`."""

from __future__ import annotations

import functools
from bisect import bisect_right
from collections.abc import Callable

import torch

from ldm_lab.data.sampler import divisors
from ldm_lab.training.planning import memory
from ldm_lab.training.planning.trial import Trial
from ldm_lab.utils.errors import UserError
from ldm_lab.utils.terminal import say


def find(trial: Trial, budget: Callable[[torch.device], int] = memory.budget) -> int:
    """The largest batch size that fits this process's device and divides its share of the global batch; prints it.

    Every rank tests its own device before there is a process group; `SmallestBatchSize` takes the minimum later.

    Args:
        trial: trial of the stage.
        budget: device -> bytes that training may use.

    Raises:
        UserError: not even one image fits.
    """
    allowed, needs = trial.portion(budget(trial.device)), functools.cache(trial.needs)
    found = largest(trial.share, needs, allowed)
    if found is None:
        raise UserError(trial.refusal(1))
    steps = trial.share // found
    used, there = memory.readable(needs(found)), memory.readable(memory.total(trial.device))
    say(f"data.batch_size=auto: {found} ({steps} micro-batch{'es' * (steps > 1)} a step, {used} of {there})")
    return found


def largest(share: int, needs: Callable[[int], float], allowed: float) -> int | None:
    """The largest divisor of `share` with `needs(divisor) <= allowed`; `None` if even 1 needs more.

    The search tries `share` first, which often fits, and then bisects, as `needs` grows with the divisor.
    """
    if needs(share) <= allowed:
        return share
    sizes = divisors(share)
    fitting = bisect_right(sizes, allowed, key=needs)
    return sizes[fitting - 1] if fitting else None

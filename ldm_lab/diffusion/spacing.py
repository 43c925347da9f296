"""Timestep spacings of samplers (Lin et al. 2024, arXiv 2305.08891, table 2).

Each function returns N distinct timesteps of the T training timesteps, descending, for every N in 1..T.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence


def leading(num_steps: int, num_train_timesteps: int) -> list[int]:
    """Multiples of T // N, ending at 0. Starts at T - 1, the most noise, only for N = T.

    >>> leading(5, 1000)
    [800, 600, 400, 200, 0]
    """
    stride = num_train_timesteps // num_steps
    return [index * stride for index in reversed(range(num_steps))]


def trailing(num_steps: int, num_train_timesteps: int) -> list[int]:
    """Equal strides of T / N, starting at T - 1, as a schedule with zero terminal SNR requires.

    >>> trailing(5, 1000)
    [999, 799, 599, 399, 199]
    """
    # T / N with the rounding error of numpy's `arange`, so that ties round as in diffusers.
    stride = num_train_timesteps - (num_train_timesteps - num_train_timesteps / num_steps)
    return [round(num_train_timesteps - index * stride) - 1 for index in range(num_steps)]


def linspace(num_steps: int, num_train_timesteps: int) -> list[int]:
    """Evenly from T - 1 to 0, both included; a single step is at 0.

    >>> linspace(5, 1000)
    [999, 749, 500, 250, 0]
    """
    stride = (num_train_timesteps - 1) / max(num_steps - 1, 1)
    return [round(index * stride) for index in reversed(range(num_steps))]


def evenly(num_steps: int, values: Sequence[float]) -> list[int]:
    """N distinct timesteps, from the last to 0, whose values are as evenly spaced as possible.

    >>> evenly(4, [0.0, 0.5, 1.0, 1.1, 2.0, 3.0])
    [5, 4, 2, 0]
    >>> evenly(4, [0.0, 30.0, 31.0, 32.0, 33.0])
    [4, 2, 1, 0]

    Args:
        num_steps: N.
        values: value of each of the T timesteps, monotonic.
    """
    first, last, total = values[0], values[-1], len(values)
    wanted = [last + (first - last) * index / max(num_steps - 1, 1) for index in range(num_steps)]
    chosen = [-1]
    for value in reversed(wanted):
        nearest = min(range(total), key=lambda t, value=value: abs(values[t] - value))
        chosen.append(max(nearest, chosen[-1] + 1))  # the next free timestep if values are closer than timesteps
    return [min(t, total - place) for place, t in enumerate(reversed(chosen[1:]), 1)]


SPACINGS: dict[str, Callable[[int, int], list[int]]] = {
    "leading": leading,
    "trailing": trailing,
    "linspace": linspace,
}

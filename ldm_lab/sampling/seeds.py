"""Where the random numbers of samples come from."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ldm_lab.utils import randomness


def generators(seed: int, indices: Iterable[int], stream: str = "sample") -> list[torch.Generator]:
    """The generators, on the CPU, that samples are drawn from: sample i follows from (seed, i) alone."""
    return [randomness.generator(seed, stream, index) for index in indices]

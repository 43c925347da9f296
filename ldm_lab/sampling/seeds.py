"""Random number generators of samples."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ldm_lab.utils import randomness


def generators(seed: int, indices: Iterable[int], stream: str = "sample") -> list[torch.Generator]:
    """One CPU generator for each sample; sample i is a function of (seed, i)."""
    return [randomness.generator(seed, stream, index) for index in indices]

"""Random numbers as a function of (seed, position), independent of earlier draws.

The position is an image's place in the global stream of training images, or a sample's index. A
resumed run, another batch size or another number of devices therefore draws the same numbers. All
numbers are drawn on the CPU, so they do not depend on the device.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import SupportsIndex

import torch
from torch import Tensor

from ldm_lab.utils.errors import UserError


def generator(seed: int, stream: str, *position: int) -> torch.Generator:
    """A CPU generator for one purpose (`stream`) at one position, independent of all others.

    Args:
        seed: the seed of the run.
        stream: purpose of the numbers ("noise", "crop", ...).
        position: integers below 2^32, e.g. the image's place in the stream of training images.
    """
    *outer, inner = position or (0,)
    key = f"{seed}/{stream}/{'/'.join(map(str, outer))}".encode()
    # torch's CPU generator keeps 32 bits of a seed. With a hash of seed and position, one run in four would have two
    # equal samples among 50,000; with this combination no two positions share a seed.
    start = int.from_bytes(blake2b(key, digest_size=4).digest(), "little")
    return torch.Generator().manual_seed((start ^ inner) & 0xFFFFFFFF)


def generators(seed: int, indices: Iterable[int], stream: str = "sample") -> list[torch.Generator]:
    """One CPU generator for each sample; sample i is a function of (seed, i)."""
    return [generator(seed, stream, index) for index in indices]


def seeded(
    given: torch.Generator | SupportsIndex | Sequence[torch.Generator | SupportsIndex] | None,
) -> torch.Generator | list[torch.Generator] | None:
    """Turn seeds, also in a list, into CPU generators; generators pass unchanged.

    Raises:
        UserError: an argument is neither a generator nor a seed.
    """
    if given is None or isinstance(given, torch.Generator):
        return given
    if isinstance(given, (list, tuple)):
        return [seeded(each) for each in given]
    try:
        return torch.Generator().manual_seed(operator.index(given))
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise UserError(f"generator={given!r}: give a torch.Generator or a seed below 2**64, or a list") from error


def normal(seed: int, stream: str, positions: Iterable[int], shape: Sequence[int]) -> Tensor:
    """Standard normal noise `(B, *shape)`, float32: row i is a function of (seed, stream, positions[i])."""
    draws = [torch.randn(*shape, generator=generator(seed, stream, int(p)), device="cpu") for p in positions]
    return torch.stack(draws)


def uniform(seed: int, stream: str, positions: Iterable[int]) -> Tensor:
    """Uniform numbers in [0, 1), `(B,)`, float64: entry i is a function of (seed, stream, positions[i])."""
    options = {"dtype": torch.float64, "device": "cpu"}
    return torch.stack([torch.rand((), generator=generator(seed, stream, int(p)), **options) for p in positions])

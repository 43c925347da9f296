"""Random numbers as a function of (seed, position), never of what was drawn before.

The position is an image's place in the global stream of training images, or a sample's index. A
resumed run, another batch size or another number of devices therefore draws the same numbers.
Everything is drawn on the CPU: the numbers do not depend on the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import blake2b

import torch
from torch import Tensor


def generator(seed: int, stream: str, *position: int) -> torch.Generator:
    """A CPU generator for one purpose (`stream`) at one position, independent of all others.

    Args:
        seed: the seed of the run.
        stream: what the numbers are for ("noise", "crop", ...): streams never share numbers.
        position: one or more integers, e.g. the image's place in the stream.
    """
    key = f"{seed}/{stream}/{'/'.join(map(str, position))}".encode()
    # torch's CPU generator takes 64 bits; the sign bit stays clear so that every backend accepts it.
    return torch.Generator().manual_seed(int.from_bytes(blake2b(key, digest_size=8).digest(), "little") >> 1)


def normal(seed: int, stream: str, positions: Iterable[int], shape: Sequence[int]) -> Tensor:
    """Standard normal noise `(B, *shape)`, float32: row i depends on (seed, stream, positions[i]) alone."""
    return torch.stack([torch.randn(*shape, generator=generator(seed, stream, int(p))) for p in positions])


def uniform(seed: int, stream: str, positions: Iterable[int]) -> Tensor:
    """Uniform numbers in [0, 1), `(B,)`, float64: entry i depends on (seed, stream, positions[i]) alone."""
    draws = [torch.rand((), generator=generator(seed, stream, int(p)), dtype=torch.float64) for p in positions]
    return torch.stack(draws)

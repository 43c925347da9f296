"""Gaussian noise from the caller's generators."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ldm_lab.utils.errors import UserError
from ldm_lab.utils.transfer import to_device


def randn(
    shape: Sequence[int],
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal noise of `shape` `(B, ...)` on `device`.

    It is drawn on the generator's device and then moved, so a CPU generator gives the same numbers for
    every device.

    >>> one, two = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
    >>> pair = randn((2, 3), [one, two])
    >>> bool((pair[1] == randn((1, 3), two.manual_seed(2))).all())
    True

    Args:
        shape: the first entry is the batch size B.
        generator: one for the whole batch; or B generators, one per sample, so that a sample does not
            depend on the batch; or `None` for torch's global generator.
        device: device of the result.
        dtype: floating-point dtype of the draw.

    Raises:
        UserError: the list of generators does not have length B.
    """
    if generator is None:
        return torch.randn(*shape, device=device, dtype=dtype)
    if isinstance(generator, torch.Generator):
        return to_device(torch.randn(*shape, generator=generator, device=generator.device, dtype=dtype), device)
    if len(generator) != shape[0]:
        raise UserError(f"generator: {len(generator)} given for a batch of {shape[0]}; give one for each sample")
    drawn = [randn((1, *shape[1:]), one, one.device, dtype) for one in generator]
    return to_device(torch.cat(drawn), device)  # one copy


def step_noise(
    like: Tensor, generator: torch.Generator | Sequence[torch.Generator] | None, variance_noise: Tensor | None
) -> Tensor:
    """The noise of one step: `variance_noise` if given, else drawn from `generator`.

    Raises:
        UserError: both are given, or the noise does not have the shape of the sample.
    """
    if variance_noise is None:
        return randn(like.shape, generator, like.device, like.dtype)
    if generator is not None:
        raise UserError("generator and variance_noise exclude each other: pass one of them")
    if variance_noise.shape != like.shape:
        raise UserError(f"variance_noise has shape {tuple(variance_noise.shape)}, the sample {tuple(like.shape)}")
    return variance_noise.to(like)

"""Decoding in overlapping tiles, so that memory does not grow with the image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from ldm_lab.utils.errors import UserError


@dataclass(frozen=True)
class Tiles:
    """Decodes square tiles of latents one by one, and blends their overlaps linearly.

    Normalisation and attention then see a tile instead of the whole image, so colours and contrast may differ
    slightly from an image decoded at once.

    Args:
        size: latent positions along one side of a tile.
        overlap: minimum number of positions that neighbouring tiles share; at most half of `size`.

    Raises:
        UserError: a value is out of its range.
    """

    size: int
    overlap: int

    def __post_init__(self) -> None:
        if self.size < 1 or not 0 <= 2 * self.overlap <= self.size:
            raise UserError(
                f"tiles of {self.size} positions that share {self.overlap}: size must be positive, and"
                " overlap between 0 and half of it"
            )

    def decode(self, decoder: Callable[[Tensor], Tensor], z: Tensor, factor: int) -> Tensor:
        """`(B, C, h, w) -> (B, C_out, factor*h, factor*w)`; `decoder` does this for a tile."""
        height, width = z.shape[2:]
        if max(height, width) <= self.size:
            return decoder(z)
        image = None
        rows, columns = (self._along(length, factor, z) for length in (height, width))
        for (top, down), (left, across) in product(rows, columns):
            tile = decoder(z[:, :, top : top + self.size, left : left + self.size])
            if image is None:
                image = tile.new_zeros(*tile.shape[:2], factor * height, factor * width)
            place = image[:, :, factor * top :, factor * left :][:, :, : tile.shape[2], : tile.shape[3]]
            place += tile * down[:, None] * across
        return image

    def _along(self, length: int, factor: int, like: Tensor) -> list[tuple[int, Tensor]]:
        """First position and pixel weights of each tile along a side; at each pixel the weights sum to one."""
        size = min(self.size, length)  # all tiles have one size, as compiled networks have one shape
        step = max(size - self.overlap, 1)
        starts = [*range(0, length - size, step), length - size]
        distance = torch.arange(1, factor * size + 1, dtype=torch.float32, device=like.device)  # from the outside
        ramp = torch.minimum(distance, distance.flip(0)).clamp(max=max(factor * self.overlap, 1))
        total = torch.zeros(factor * length, device=like.device)
        for start in starts:
            total[factor * start : factor * (start + size)] += ramp
        return [(start, (ramp / total[factor * start : factor * (start + size)]).to(like.dtype)) for start in starts]

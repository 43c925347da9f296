"""Pixel losses that weight colour separately from brightness."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ldm_lab.utils.errors import UserError
from ldm_lab.utils.images import LUMA_CHROMA


class ColourMSE(nn.Module):
    """Squared error of luma and chroma: d = mean(ΔY² + chroma · (ΔCb² + ΔCr²)) over the pixels.

    In an RGB mean, colour has little weight. A grey error e costs e² in both losses. A pure colour error, which leaves
    the luma unchanged, costs more here, in proportion to `chroma`. A short training learns brightness first, and would
    end before it has learned hues.

    Args:
        chroma: weight of the colour differences, at least 0.

    Raises:
        UserError: `chroma` is negative.
    """

    def __init__(self, chroma: float = 4.0) -> None:
        super().__init__()
        if chroma < 0:
            raise UserError(f"model.loss.pixel.chroma={chroma}: must be at least 0")
        matrix = torch.tensor(LUMA_CHROMA) * torch.tensor([1.0, chroma, chroma]).sqrt()[:, None]
        self.register_buffer("matrix", matrix[:, :, None, None], persistent=False)  # (3, 3, 1, 1)

    def forward(self, reconstruction: Tensor, target: Tensor) -> Tensor:
        """`(B, 3, H, W)` twice, in [-1, 1] -> 0-dim."""
        error = (reconstruction - target)[:, None]  # (B, 1, 3, H, W)
        parts = (self.matrix * error).sum(2)  # -> (B, 3, H, W); not a matrix product, which autocast would round
        return parts.square().sum(1).mean()

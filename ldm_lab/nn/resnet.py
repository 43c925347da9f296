"""The residual block of both stages."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class ResnetBlock(nn.Module):
    """Two times GroupNorm, SiLU, 3x3 convolution, around which the input is added.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output; where they differ, a 1x1 convolution carries the input over.
        groups: groups of the normalisation; must divide both numbers of channels.
        eps: added to the variance by the normalisation (1e-6 in autoencoders, 1e-5 in UNets).
        time_channels: length of the time embedding that is projected and added between the two
            convolutions; None in an autoencoder, which knows no time.
        dropout: probability, before the second convolution.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        groups: int = 32,
        eps: float = 1e-6,
        time_channels: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = None if time_channels is None else nn.Linear(time_channels, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = None if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, time_embedding: Tensor | None = None) -> Tensor:
        """`(B, in_channels, H, W)` and `(B, time_channels)` -> `(B, out_channels, H, W)`."""
        h = self.conv1(F.silu(self.norm1(x)))
        if self.time_emb_proj is not None:
            h = h + self.time_emb_proj(F.silu(time_embedding))[:, :, None, None]  # (B, C) -> (B, C, 1, 1)
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + h

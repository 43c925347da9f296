"""Residual block of autoencoders and UNet."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ldm_lab.models.layers.recomputed import Recomputed
from ldm_lab.models.layers.winograd import Conv3x3


class ResnetBlock(Recomputed):
    """Twice GroupNorm, SiLU and 3x3 convolution, with a residual connection.

    A time embedding is projected and enters between the convolutions: added before the second normalisation (Ho
    et al. 2020, arXiv 2006.11239), or with `scale_shift` as a scale s and a shift b after it,
    `(1 + s) GroupNorm(h) + b` (Dhariwal & Nichol 2021, arXiv 2105.05233, section 3.1, "AdaGN").

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output; None: as the input. If they differ, a 1x1 convolution maps the input
            for the residual connection.
        groups: groups of the normalisation; must divide both numbers of channels.
        eps: added to the variance by the normalisation (1e-6 in autoencoders, 1e-5 in UNets).
        time_channels: length of the time embedding; None: no time embedding (autoencoders).
        dropout: dropout probability before the second convolution.
        scale_shift: whether the time embedding scales and shifts instead of being added.
        resample: a layer without parameters that halves or doubles the resolution of the residual connection and
            of the first convolution's input.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        groups: int = 32,
        eps: float = 1e-6,
        time_channels: int | None = None,
        dropout: float = 0.0,
        scale_shift: bool = False,
        resample: nn.Module | None = None,
    ) -> None:
        super().__init__()
        out_channels = in_channels if out_channels is None else out_channels
        self.scale_shift = scale_shift
        self.resample = nn.Identity() if resample is None else resample
        self.norm1 = nn.GroupNorm(groups, in_channels, eps)
        self.conv1 = Conv3x3(in_channels, out_channels)
        projected = 2 * out_channels if scale_shift else out_channels
        self.time_emb_proj = None if time_channels is None else nn.Linear(time_channels, projected)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = Conv3x3(out_channels, out_channels)
        self.conv_shortcut = None if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, time_embedding: Tensor | None = None) -> Tensor:
        """`(B, in_channels, H, W)` and `(B, time_channels)` -> `(B, out_channels, H, W)`, or H and W resampled."""
        return self.recomputed(self._forward, x, time_embedding)

    def _forward(self, x: Tensor, time_embedding: Tensor | None) -> Tensor:
        h = self.conv1(self.resample(F.silu(self.norm1(x))))
        h = F.silu(self._normalise(h, time_embedding))
        h = self.conv2(self.dropout(h))
        x = self.resample(x)
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + h

    def _normalise(self, h: Tensor, time_embedding: Tensor | None) -> Tensor:
        """The second normalisation with the time embedding."""
        if self.time_emb_proj is None:
            return self.norm2(h)
        time = self.time_emb_proj(F.silu(time_embedding))[:, :, None, None]  # (B, C) -> (B, C, 1, 1)
        if not self.scale_shift:
            return self.norm2(h + time)
        scale, shift = time.chunk(2, dim=1)  # (B, 2C, 1, 1) -> (B, C, 1, 1) each
        return self.norm2(h) * (1 + scale) + shift

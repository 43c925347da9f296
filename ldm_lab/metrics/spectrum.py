"""Spectrum of latents."""

from __future__ import annotations

import torch
from torch import Tensor

HALF = 0.25  # half of the Nyquist frequency, in cycles per position


def high_frequency_share(latents: Tensor) -> Tensor:
    """Share of the latents' energy in the upper half of the frequencies: `(B, C, h, w)` -> 0-dim, float32, in [0, 1].

    These are the frequencies whose radius (f_x^2 + f_y^2)^(1/2) is above half of the Nyquist frequency. The mean of
    each map is removed first. White noise has about 0.80, images a few hundredths. The share of constant maps is 0.
    """
    latents = latents.float()
    power = torch.fft.fft2(latents - latents.mean(dim=(-2, -1), keepdim=True)).abs().square().sum(dim=(0, 1))  # (h, w)
    vertical, horizontal = (torch.fft.fftfreq(side, device=latents.device) for side in power.shape)
    high = vertical[:, None].square() + horizontal.square() > HALF**2
    return (power * high).sum() / power.sum().clamp(min=torch.finfo(power.dtype).tiny)

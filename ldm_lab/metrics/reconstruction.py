"""Reconstruction metrics: PSNR and SSIM, computed per image and then averaged.

Images are clamped to [-1, 1], as for display, but not rounded to 8 bits (rounding costs less than
0.01 dB at 30 dB). The mean over batches, weighted by their sizes, is the mean over the data set.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from ldm_lab.utils import float32


def psnr(reconstruction: Tensor, target: Tensor) -> Tensor:
    """Peak signal-to-noise ratio: the mean over images of 10 log10(1 / MSE), images scaled to [0, 1].

    Args:
        reconstruction: `(B, C, H, W)` in [-1, 1], any floating-point type.
        target: the same.

    Returns:
        0-dim, dB, float32; infinite if an image is reproduced exactly.
    """
    return peak_signal_noise_ratio(_unit_range(reconstruction), _unit_range(target), data_range=1.0, dim=(1, 2, 3))


def ssim(reconstruction: Tensor, target: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004, Eq. 13), 11 × 11 Gaussian window of σ = 1.5: the mean over images.

    Arguments as of `psnr`; 0-dim, float32, 1 for equal images.
    """
    # Variances are small differences of large numbers, so reduced precision would destroy them.
    with torch.autocast(target.device.type, enabled=False), float32.exact():
        return structural_similarity_index_measure(_unit_range(reconstruction), _unit_range(target), data_range=1.0)


def _unit_range(images: Tensor) -> Tensor:
    """[-1, 1] -> [0, 1], clamped, float32."""
    return ((images.float() + 1) / 2).clamp(0, 1)

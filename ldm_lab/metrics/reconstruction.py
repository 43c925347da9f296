"""Reconstruction metrics: PSNR and SSIM, computed per image and then averaged, and two of the colours alone.

Images are clamped to [-1, 1], as for display, but not rounded to 8 bits (rounding costs less than
0.01 dB at 30 dB). The mean over batches, weighted by their sizes, is the mean over the data set.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from ldm_lab.utils import float32
from ldm_lab.utils.images import LUMA_CHROMA

# A pixel is colourful if its (Cb, Cr) is longer than this; grey has 0, and pure blue and red have 0.5.
COLOURFUL = 0.1
# Its hue is kept within this angle, and its saturation down to this fraction.
ANGLE, PALE = math.radians(30), 0.5


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


def psnr_chroma(reconstruction: Tensor, target: Tensor) -> Tensor:
    """`psnr` of the colour differences Cb and Cr alone, which range over [-1/2, 1/2]; arguments as of `psnr`."""
    return peak_signal_noise_ratio(_chroma(reconstruction), _chroma(target), data_range=1.0, dim=(1, 2, 3))


def hues_kept(reconstruction: Tensor, target: Tensor) -> Tensor:
    """Share of the target's colourful pixels whose hue the reconstruction keeps; 1 if no pixel is colourful.

    A pixel is colourful if the length of (Cb, Cr) exceeds 0.1. Its hue is kept if the reconstructed (Cb, Cr) is at most
    30 degrees away, and at least half as long. Arguments as of `psnr`, C = 3; 0-dim, float32.
    """
    found, expected = _chroma(reconstruction), _chroma(target)
    lengths, saturation = found.norm(dim=1), expected.norm(dim=1)  # (B, 2, H, W) -> (B, H, W)
    near = (found * expected).sum(1) >= math.cos(ANGLE) * lengths * saturation
    colourful = saturation > COLOURFUL
    kept = colourful & near & (lengths >= PALE * saturation)
    return torch.where(colourful.any(), kept.sum() / colourful.sum().clamp(min=1), 1.0)


def _chroma(images: Tensor) -> Tensor:
    """RGB `(B, 3, H, W)` in [-1, 1] -> Cb and Cr, `(B, 2, H, W)`, float32."""
    weights = images.new_tensor(LUMA_CHROMA[1:], dtype=torch.float32)[:, :, None, None]  # (2, 3, 1, 1)
    return (weights * _unit_range(images)[:, None]).sum(2)  # not a matrix product, which TF32 or autocast would round


def _unit_range(images: Tensor) -> Tensor:
    """[-1, 1] -> [0, 1], clamped, float32."""
    return ((images.float() + 1) / 2).clamp(0, 1)

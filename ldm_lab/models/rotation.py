"""The rotation trick: a gradient that keeps angles, for quantizers (Fifty et al. 2024, arXiv 2410.06424)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SHORTEST = 1e-6  # a shorter latent has no direction to rotate from


def rotate(latents: Tensor, codes: Tensor) -> Tensor:
    """The value of the codes, with the gradient of the rotation and scaling that take each latent to its code.

    For a latent e and its code q, with e^, q^ their directions and w = (e^ + q^) / |e^ + q^| (Fifty et al. 2024,
    section 4.2 and appendix A.6):

        q~ = |q| / |e| R e,    R e = e - 2 w (w.e) + 2 q^ (e^.e)

    All factors but e itself are constants of the gradient. So the gradient at e is |q| / |e| R^T times the gradient at
    q: its angle with e is the angle of the gradient at q with q. Straight-through gradients keep the direction instead,
    whatever lies between latent and code. The gradient of a latent shorter than 1e-6 goes straight through.

    Args:
        latents: `(..., C)`, float32.
        codes: the nearest codes, of the same shape; they get no gradient here.

    Returns:
        The quantized latents `(..., C)`: exactly the values of `codes`.
    """
    codes, constant = codes.detach(), latents.detach()
    length = constant.norm(dim=-1, keepdim=True)
    has_direction = length > SHORTEST
    start, end = F.normalize(constant, dim=-1), F.normalize(codes, dim=-1)
    middle = F.normalize(start + end, dim=-1)  # 0 where they are opposite: R is then a reflection, which does as well
    turned = latents - 2 * middle * _dot(middle, latents) + 2 * end * _dot(start, latents)
    # The clamp keeps the branch that `where` drops finite; infinity times a zero gradient would be NaN.
    scaled = codes.norm(dim=-1, keepdim=True) / length.clamp(min=SHORTEST) * turned
    moved = torch.where(has_direction, scaled, latents)
    return codes + (moved - moved.detach())  # the second term is 0, and carries the gradient


def _dot(one: Tensor, other: Tensor) -> Tensor:
    return (one * other).sum(dim=-1, keepdim=True)

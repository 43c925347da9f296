"""SimVQ: all codes of a codebook are trained at once, by a matrix (Zhu et al. 2024, arXiv 2411.02038)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SimVQ(nn.Module):
    """A codebook C W: C `(n, d)` is frozen, W `(d, d)` is trained (Zhu et al. 2024, section 4).

    In a plain codebook only the codes that are nearest to a latent get a gradient, and the others stay behind. The
    gradient of W moves all codes. It is a part of training: the autoencoder holds the product, a plain codebook, which
    `write` updates after each step.

    At first C is Gaussian with a mean squared norm of 1, and W the identity.

    Args:
        num_codes: number of codes n.
        length: length of a code d.

    Attributes:
        basis: C, in the state dict.
        weight: W.
    """

    basis: Tensor

    def __init__(self, num_codes: int, length: int) -> None:
        super().__init__()
        self.register_buffer("basis", torch.randn(num_codes, length) * length**-0.5)
        self.weight = nn.Parameter(torch.eye(length))

    def forward(self) -> Tensor:
        """The codes C W, `(n, d)`, float32 under autocast too; their gradient reaches W."""
        with torch.autocast(self.weight.device.type, enabled=False):
            return self.basis @ self.weight

    @torch.no_grad()
    def start(self, codes: Tensor) -> None:
        """Begin with trained codes `(n, d)`: they become C, and W the identity."""
        self.basis.copy_(codes)
        self.weight.copy_(torch.eye(len(self.weight)))

    @torch.no_grad()
    def write(self, codes: Tensor) -> None:
        """Set a plain codebook `(n, d)` to C W."""
        codes.copy_(self())

    @torch.no_grad()
    def follow(self, codes: Tensor) -> None:
        """Take over the codes e that were replaced in a plain codebook `(n, d)` since `write`: c = e W^-1.

        A code stays as it was where W has no inverse. The codebook is written again, as C W is rounded.
        """
        replaced = (codes != self()).any(1, keepdim=True)  # (n, 1)
        # `solve_ex`, as `solve` makes the host wait for the device to see whether W has an inverse.
        rows = torch.linalg.solve_ex(self.weight, codes, left=False).result
        replaced &= rows.isfinite().all(1, keepdim=True)
        self.basis.copy_(torch.where(replaced, rows, self.basis))
        self.write(codes)

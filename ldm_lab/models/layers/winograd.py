"""3x3 convolutions with fewer multiplications: F(2x2, 3x3) of Lavin & Gray 2015 (arXiv 1509.09308, section 4.1).

Each 2x2 tile of the output is computed from a 4x4 tile of the input. Along one side, two outputs of three taps take
four products instead of six, in both directions 16 instead of 36: `Y = A^T [(G g G^T) * (B^T d B)] A` (equation 8).
The products of all tiles are 16 matrix products. Rounding errors in float32 are those of a reordered sum.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_lab.models.layers.cpu import takes_own_way

_G = ((1, 0, 0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0, 0, 1))  # three taps (columns) -> four factors (rows)
_CACHED = 2**21  # numbers in transformed tiles at a time, 8 MiB, so that they stay in the core's cache


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution of stride 1 and padding 1; uses Winograd's algorithm in float32 on CPUs if it is faster.

    It is faster for wide and large maps; for other maps the memory-bound additions cost as much as the products save.
    bfloat16 would lose precision. In all other cases torch's kernel runs (see `takes_own_way`).
    """

    WIDE = 192  # channels
    LARGE = 32 * 32  # positions

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C_in, H, W) -> (B, C_out, H, W)`."""
        return _Winograd.apply(x, self.weight, self.bias) if self._pays(x) else super().forward(x)

    def _pays(self, x: Tensor) -> bool:
        height, width = x.shape[-2:]
        return (
            min(self.in_channels, self.out_channels) >= self.WIDE
            and height * width >= self.LARGE
            and height % 2 == width % 2 == 0
            and takes_own_way(x, self.weight, torch.float32)
        )


class _Winograd(torch.autograd.Function):
    """The convolution and its gradients; the input's gradient uses the same algorithm."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:  # noqa: ANN001
        ctx.save_for_backward(x, weight)
        return convolve(x, weight).add_(bias[:, None, None])

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN001
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        return (
            _Winograd.apply(gradient, weight.transpose(0, 1).flip(2, 3), weight.new_zeros(len(x[0]))) if of_x else None,
            nn.grad.conv2d_weight(x, weight.shape, gradient, padding=1) if of_weight else None,
            gradient.sum((0, 2, 3)) if of_bias else None,
        )


def convolve(x: Tensor, weight: Tensor) -> Tensor:
    """The convolution of padding 1 without bias: `(B, C_in, H, W)` and `(C_out, C_in, 3, 3) -> (B, C_out, H, W)`.

    H and W must be even. The result of an image does not depend on the other images.
    """
    batch, channels, height, width = x.shape
    kernel = transformed(weight)
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))  # (B, C, H, W) -> (B, H + 2, W + 2, C)
    out = x.new_empty(batch, height, width, len(weight))
    rows = max(2, _CACHED // (4 * width * max(channels, len(weight))) // 2 * 2)
    for image, target in zip(padded, out, strict=True):
        for top in range(0, height, rows):
            _convolve_rows(image[top : top + rows + 2], kernel, target[top : top + rows])
    return out.permute(0, 3, 1, 2)


def transformed(weight: Tensor) -> Tensor:
    """`G g G^T`: `(C_out, C_in, 3, 3) -> (16, C_in, C_out)`, the 4x4 factors of a tile in column order."""
    out_channels, in_channels = weight.shape[:2]
    g = weight.new_tensor(_G)
    taps = weight.permute(3, 2, 0, 1).reshape(9, -1)  # (C_out, C_in, 3, 3) -> (9, C_out*C_in)
    return (torch.kron(g, g) @ taps).view(16, out_channels, in_channels).transpose(1, 2)


def _convolve_rows(x: Tensor, kernel: Tensor, out: Tensor) -> None:
    """Convolve the tiles of some rows: `(H + 2, W + 2, C_in)` into `out`, `(H, W, C_out)`."""
    height, width, _ = out.shape
    channels = x.shape[-1]
    lines = x.new_empty(4, height // 2, width + 2, channels)
    _factors([x[i : i + height : 2] for i in range(4)], lines)
    tiles = x.new_empty(4, 4, height // 2, width // 2, channels)
    _factors([lines[:, :, j : j + width : 2] for j in range(4)], tiles)
    products = torch.bmm(tiles.view(16, -1, channels), kernel)  # (16, HW/4, C_in) -> (16, HW/4, C_out)
    products = products.view(4, 4, height // 2, width // 2, -1)
    columns = products.new_empty(2, *products.shape[1:])
    _outputs(products, columns)
    for j, column in enumerate(columns):
        _outputs(column, [out[i::2, j::2] for i in range(2)])


def _factors(inputs: Sequence[Tensor], out: Tensor) -> None:
    """`B^T d`: four neighbours along one side -> four factors."""
    torch.sub(inputs[0], inputs[2], out=out[0])
    torch.add(inputs[1], inputs[2], out=out[1])
    torch.sub(inputs[2], inputs[1], out=out[2])
    torch.sub(inputs[1], inputs[3], out=out[3])


def _outputs(products: Sequence[Tensor], out: Sequence[Tensor]) -> None:
    """`A^T m`: four products along one side -> two outputs."""
    torch.add(products[0], products[1], out=out[0]).add_(products[2])
    torch.sub(products[1], products[2], out=out[1]).sub_(products[3])

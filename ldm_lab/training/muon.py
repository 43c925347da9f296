"""Muon: steps of convolutions with all directions equally long, other parameters by AdamW."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm_lab.utils.errors import UserError
from ldm_lab.utils.limits import NonNegative, Probability

FEWEST_CHANNELS = 16  # with fewer, in or out, as of a first or last convolution, a matrix has few directions
QUINTIC = (3.4445, -4.7750, 2.0315)  # coefficients of Jordan et al. 2024; singular values end within 0.68 and 1.13
ITERATIONS = 5
RMS = 0.2  # of a step, about that of Adam: Liu et al. 2025, arXiv 2502.16982, section 2.2


class Muon(torch.optim.AdamW):
    """Muon for the weights of convolutions (Jordan et al. 2024, "Muon"), AdamW for all other parameters.

    A weight `(out, in, kh, kw)` is the matrix `(out, in * kh * kw)`. The momentum U S V^T of a matrix is replaced by
    about U V^T, so that directions with small gradients move as far as those with large ones. Steps have the root mean
    square of Adam's (Liu et al. 2025, arXiv 2502.16982, Eq. 4), so that one `lr` and `weight_decay` serve all
    parameters. Linear layers, of attention and of the time, gain nothing by Muon (docs/muon.md), and cost half of it.

    Args:
        params: parameters or groups, as of every optimizer.
        lr: learning rate.
        momentum: of convolutions; Nesterov's.
        betas: of the other parameters.
        weight_decay: decoupled.
        **adamw: see `torch.optim.AdamW`.

    Raises:
        UserError: a value is out of range.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: NonNegative = 3e-3,
        momentum: Probability = 0.9,
        betas: Sequence[Probability] = (0.9, 0.99),
        weight_decay: NonNegative = 0.01,
        **adamw: Any,  # noqa: ANN401
    ) -> None:
        try:
            super().__init__(params, lr=lr, betas=tuple(betas), weight_decay=weight_decay, **adamw)
        except ValueError as error:  # torch's word for a value out of range
            raise UserError(str(error)) from error
        for group in self.param_groups:
            group.setdefault("momentum", momentum)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # noqa: ANN401
        """One step of all parameters with a gradient; returns the closure's result."""
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        matrices = [(group, weight, weight.grad) for group, weight in self._matrices()]
        for _, weight, _ in matrices:
            weight.grad = None  # AdamW passes over it
        super().step()
        moments = [self._moment(group, weight, gradient) for group, weight, gradient in matrices]
        for (group, weight, gradient), direction in zip(matrices, orthogonal(moments), strict=True):
            weight.grad = gradient
            weight.mul_(1 - group["lr"] * group["weight_decay"])
            weight.add_(direction.view_as(weight), alpha=-group["lr"] * RMS * max(direction.shape) ** 0.5)
        return result

    def _matrices(self) -> Iterator[tuple[dict[str, Any], Tensor]]:
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None and weight.ndim == 4 and min(weight.shape[:2]) >= FEWEST_CHANNELS:
                    yield group, weight

    def _moment(self, group: dict[str, Any], weight: Tensor, gradient: Tensor) -> Tensor:
        """Nesterov's momentum of a weight as a matrix."""
        state = self.state[weight]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")  # AdamW expects a count when loading
            state["momentum_buffer"] = torch.zeros_like(weight)
        state["step"] += 1
        buffer = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        return gradient.lerp(buffer, group["momentum"]).flatten(1)


def orthogonal(matrices: Sequence[Tensor]) -> list[Tensor]:
    """About U V^T of each matrix U S V^T, `(m, n)`, float32.

    Five steps of the odd polynomial a x + b x^3 + c x^5 on the singular values. Each step multiplies the matrix by a
    polynomial of its Gram matrix. All steps are gathered there, as Gram matrices are small and those of one size are
    computed together; then the matrix is multiplied once.
    """
    wide = [matrix.float() if matrix.shape[0] <= matrix.shape[1] else matrix.float().T for matrix in matrices]
    found: list[Tensor] = list(wide)
    for side in dict.fromkeys(len(matrix) for matrix in wide):
        places = [place for place, matrix in enumerate(wide) if len(matrix) == side]
        grams = torch.stack([wide[place] @ wide[place].T for place in places])  # (N, side, side)
        for place, factor in zip(places, _factors(grams), strict=True):
            found[place] = factor @ wide[place]
    pairs = zip(matrices, found, strict=True)
    return [direction if direction.shape == matrix.shape else direction.T for matrix, direction in pairs]


def _factors(grams: Tensor) -> Tensor:
    """The matrices P for which P M is M with all singular values near 1, `(N, m, m)`, from all M M^T."""
    squares = grams.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]  # of the norms
    scale = squares.clamp(min=1e-14).rsqrt()
    grams = grams * scale**2
    factors, identity = scale, torch.eye(grams.shape[1], device=grams.device)
    a, b, c = QUINTIC
    for step in range(ITERATIONS):
        factor = torch.baddbmm(a * identity + b * grams, grams, grams, alpha=c)
        factors = factor * factors if step == 0 else factor @ factors
        if step < ITERATIONS - 1:
            grams = factor @ grams @ factor
    return factors

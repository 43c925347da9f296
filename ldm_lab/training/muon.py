"""Muon: steps of matrices with all directions equally long, other parameters by AdamW."""

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
    """AdamW for vectors, Muon for weights of linear layers and convolutions (Jordan et al. 2024, "Muon").

    A convolution's weight `(out, in, kh, kw)` is the matrix `(out, in * kh * kw)`. The momentum B = U S V^T of a matrix
    is replaced by about U V^T, so that directions with small gradients move as far as those with large ones. Steps have
    the root mean square of Adam's (Liu et al. 2025, arXiv 2502.16982, Eq. 4), so that one `lr` and `weight_decay`
    serve all parameters.

    Args:
        params: parameters or groups, as of every optimizer.
        lr: learning rate.
        momentum: of matrices; Nesterov's.
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
        for group, weight, gradient in matrices:
            weight.grad = gradient
            self._move(group, weight, gradient)
        return result

    def _matrices(self) -> Iterator[tuple[dict[str, Any], Tensor]]:
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None and weight.ndim > 1 and min(weight.shape[:2]) >= FEWEST_CHANNELS:
                    yield group, weight

    def _move(self, group: dict[str, Any], weight: Tensor, gradient: Tensor) -> None:
        state = self.state[weight]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")  # AdamW expects a count when loading
            state["momentum_buffer"] = torch.zeros_like(weight)
        state["step"] += 1
        buffer = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        matrix = gradient.lerp(buffer, group["momentum"]).flatten(1)
        scale = RMS * max(matrix.shape) ** 0.5
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.add_(orthogonal(matrix).view_as(weight), alpha=-group["lr"] * scale)


def orthogonal(matrix: Tensor) -> Tensor:
    """About U V^T of a matrix U S V^T, `(m, n)`, float32.

    Five steps of the odd polynomial a x + b x^3 + c x^5 on the singular values. Each step multiplies the matrix by a
    polynomial of its Gram matrix, which is small for convolutions, so that the products are gathered there, and the
    long matrix is multiplied once.
    """
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonal(matrix.T).T
    matrix = matrix.float()
    matrix = matrix / matrix.norm().clamp(min=1e-7)
    gram, identity = matrix @ matrix.T, torch.eye(len(matrix), device=matrix.device)
    a, b, c = QUINTIC
    product = identity
    for _ in range(ITERATIONS):
        factor = a * identity + b * gram + c * gram @ gram
        product = factor @ product
        gram = factor @ gram @ factor
    return product @ matrix

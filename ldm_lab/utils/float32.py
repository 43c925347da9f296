"""How exactly NVIDIA GPUs multiply float32 numbers: with all 24 bits, or rounded to the 11 of TensorFloat-32."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

PRECISIONS = ("highest", "high", "medium")  # those of `torch.set_float32_matmul_precision`


def allow(precision: str) -> None:
    """Set what matrix products and convolutions may do, in this process: TF32 unless `precision` is "highest".

    For training and sampling on a GPU. torch keeps two settings, with opposite defaults; one rule is easier to know.
    Not for CPUs: there `high` means TF32 and `medium` bfloat16 wherever a processor has them (AMX).
    """
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = precision != "highest"


@contextlib.contextmanager
def exact() -> Iterator[None]:
    """All bits, on every device, whatever is set: where numbers are compared."""
    products, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    allow("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions

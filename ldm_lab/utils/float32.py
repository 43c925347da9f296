"""Precision of float32 products on NVIDIA GPUs: all 24 bits, or TensorFloat-32 with 11 bits."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

PRECISIONS = ("highest", "high", "medium")  # values of `torch.set_float32_matmul_precision`


def allow(precision: str) -> None:
    """Allow TF32 in matrix products and convolutions of this process, unless `precision` is "highest".

    For training and sampling on a GPU. torch has two settings with opposite defaults; one rule is simpler. Not for
    CPUs, where torch takes `high` as TF32 and `medium` as bfloat16 if the processor has them (AMX).
    """
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = precision != "highest"


@contextlib.contextmanager
def exact() -> Iterator[None]:
    """Context of full float32 precision on every device, whatever the settings, for comparing numbers."""
    products, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    allow("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions

"""Which features: by name, to an extractor."""

from __future__ import annotations

from pathlib import Path

import torch

from ldm_lab.metrics.dinov2 import DINOv2
from ldm_lab.metrics.extractors import Extractor, Inception
from ldm_lab.metrics.images import Pixels
from ldm_lab.metrics.own import own
from ldm_lab.utils.errors import UserError

OWN = "own"
PRETRAINED: dict[str, type[Extractor]] = {"inception": Inception, "dinov2": DINOv2}
FEATURES = (OWN, *PRETRAINED)


def check(kind: str, weights: str | None) -> None:
    """Raise `UserError` where there are no such features, or they take no weights."""
    if kind not in FEATURES:
        raise UserError(f"features={kind}: there are {', '.join(FEATURES)}")
    if kind == OWN and weights:
        raise UserError(f"weights={weights}: own features are trained here and take none; name inception or dinov2")


def make(kind: str, weights: str | None, images: Pixels, cache_dir: str | Path, device: torch.device) -> Extractor:
    """The extractor of that name, on the CPU.

    Args:
        kind: one of `FEATURES`.
        weights: file of pretrained ones; None: from torch's hub.
        images: those that own features are learned from.
        cache_dir: where these are kept.
        device: where they are trained.

    Raises:
        UserError: there is none of that name, or it cannot be had.
        LoadError: the file holds something else.
    """
    check(kind, weights)
    return own(images, cache_dir, device) if kind == OWN else PRETRAINED[kind](weights)

"""Makes feature extractors by name."""

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


def check(kind: str, weights: str | None, channels: int = 3) -> None:
    """Raise `UserError` if the features are unknown, do not take weights, or do not see so many channels."""
    if kind not in FEATURES:
        raise UserError(f"features={kind}: there are {', '.join(FEATURES)}")
    if kind != OWN and channels not in (1, 3):
        raise UserError(f"features={kind}: sees RGB or grey, not {channels} channels; own features take any number")
    if kind == OWN and weights:
        raise UserError(f"weights={weights}: own features are trained here and take none; name inception or dinov2")


def make(kind: str, weights: str | None, images: Pixels, cache_dir: str | Path, device: torch.device) -> Extractor:
    """Make the extractor of a name, on the CPU.

    Args:
        kind: one of `FEATURES`.
        weights: file of pretrained weights; None: from torch's hub.
        images: training images of the extractor "own".
        cache_dir: cache folder of "own".
        device: training device of "own".

    Raises:
        UserError: the name is unknown, or the extractor is not available.
        LoadError: the file holds other weights.
    """
    check(kind, weights)
    return own(images, cache_dir, device) if kind == OWN else PRETRAINED[kind](weights)

"""Embeds pictures into a page: a limited number of each kind, scaled down."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ldm_lab.runs.record import read_picture


@dataclass(frozen=True)
class Budget:
    """Limits of the pictures on a page.

    Attributes:
        steps: pictures of each kind per run, evenly spaced over training, the first and the last included.
        width: maximum width in pixels; wider pictures are scaled down.
        quality: WebP quality, 1 to 100. A smaller PNG is kept.
    """

    steps: int = 12
    width: int = 800
    quality: int = 80


def chosen(steps: Sequence[int], most: int) -> list[int]:
    """At most `most` of the sorted `steps`, evenly spaced; with `most` = 1, the last step."""
    if len(steps) <= most:
        return list(steps)
    if most < 2:
        return list(steps[-1:]) * most
    return [steps[place * (len(steps) - 1) // (most - 1)] for place in range(most)]


def inlined(path: Path, budget: Budget) -> str:
    """A picture as a `data:` URI, PNG or WebP, whichever is smaller.

    Raises:
        LoadError: the file is not a picture (see `read_picture`).
    """
    image = read_picture(path)
    width, height = image.size
    shrunk = width > budget.width
    if shrunk:
        size = budget.width, max(1, round(height * budget.width / width))
        image = image.resize(size, Image.Resampling.LANCZOS)
    packed = io.BytesIO()
    image.save(packed, "WEBP", quality=budget.quality, method=4)
    content, kind = packed.getvalue(), "webp"
    if not shrunk and path.stat().st_size <= len(content):
        content, kind = path.read_bytes(), "png"
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"

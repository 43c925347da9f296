"""Pictures as part of a page: so many of each kind, no larger than a page needs."""

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
    """How much of the pictures a page holds.

    Attributes:
        steps: pictures of each kind from each run, evenly over the training, the first and the last among them.
        width: pixels; wider ones are scaled down.
        quality: of WebP, 1 to 100. A PNG that is smaller stays as it is.
    """

    steps: int = 12
    width: int = 800
    quality: int = 80


def chosen(steps: Sequence[int], most: int) -> list[int]:
    """At most `most` of the sorted `steps`, evenly; the last one before the first one where there is room for one."""
    if len(steps) <= most:
        return list(steps)
    if most < 2:
        return list(steps[-1:]) * most
    return [steps[place * (len(steps) - 1) // (most - 1)] for place in range(most)]


def inlined(path: Path, budget: Budget) -> str:
    """A picture as a `data:` URI, PNG or WebP, whichever is smaller.

    Raises:
        LoadError: the file is no picture (see `read_picture`).
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

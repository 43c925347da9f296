"""Lengths as people type them: `250k`, `2M`, `100ep` are numbers of images."""

from __future__ import annotations

import math
import re
from decimal import Decimal

from ldm_lab.utils.errors import UserError

UNITS = {"": 1, "k": 1_000, "M": 1_000_000}
_LENGTH = re.compile(r"(\d+(?:\.\d+)?)\s*(k|M|ep|)")


def parse_images(text: str | int, key: str, epoch: int | None = None) -> int:
    """A number of images from `4000`, `250k`, `2M`, `1.5M` or, where an epoch is known, `100ep`.

    Args:
        text: as typed.
        key: what it was typed for, for the message.
        epoch: images in one epoch.

    Raises:
        UserError: it is nothing of the kind, or not a whole number of images.
    """
    found = _LENGTH.fullmatch(str(text).strip())
    unit = found[2] if found else ""
    if not found or (unit == "ep" and epoch is None):
        forms = "4000, 250k or 2M" + ("" if epoch is None else ", or 100ep for epochs")
        raise UserError(f"{key}={text}: must be a whole number of images, such as {forms}")
    # Decimal: 1.1 * 1_000_000 is no whole number in floating point.
    images = Decimal(found[1]) * (epoch if unit == "ep" else UNITS[unit])
    if unit != "ep" and images % 1:
        raise UserError(f"{key}={text}: is not a whole number of images")
    return math.ceil(images)


def short(images: int) -> str:
    """The shortest way to type a number of images: `2M`, `250k`, `1234`."""
    for unit in ("M", "k"):
        if images and images % UNITS[unit] == 0:
            return f"{images // UNITS[unit]}{unit}"
    return str(images)

"""Parses typed lengths: `250k`, `2M`, `100ep`, `25%` are numbers of images."""

from __future__ import annotations

import math
import re
from decimal import Decimal

from ldm_lab.utils.errors import UserError

UNITS = {"": 1, "k": 1_000, "M": 1_000_000}
SIZES = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kKMGT]?B|)")
_LENGTH = re.compile(r"(\d+(?:\.\d+)?)\s*(k|M|ep|%|)")


def parse_images(text: str | int, key: str, epoch: int | None = None, stage: int | None = None) -> int:
    """Parse `4000`, `250k`, `2M`, `1.5M` or, if `epoch` or `stage` is given, `100ep` or `25%` as a number of images.

    Args:
        text: the typed text.
        key: the setting, for the message.
        epoch: images per epoch.
        stage: images of the stage.

    Raises:
        UserError: the text has another form, or is not a whole number of images.
    """
    found = _LENGTH.fullmatch(str(text).strip())
    unit = found[2] if found else ""
    known = {**UNITS, "ep": epoch, "%": None if stage is None else Decimal(stage) / 100}
    if not found or known[unit] is None:
        forms = "4000, 250k or 2M" + ("" if epoch is None else ", or 100ep for epochs")
        forms += "" if stage is None else ", or 25% of max_images"
        raise UserError(f"{key}={text}: must be a whole number of images, such as {forms}")
    # Decimal, as 1.1 * 1_000_000 is not an integer in floating point.
    images = Decimal(found[1]) * known[unit]
    if unit in UNITS and images % 1:
        raise UserError(f"{key}={text}: is not a whole number of images")
    return math.ceil(images)


def parse_bytes(text: str | int | None, key: str) -> int | None:
    """Parse `200GB`, `1.5 TB` or a number of bytes; `None` stays `None`. Raises `UserError` for another form."""
    found = _SIZE.fullmatch(str(text).strip())
    if text is not None and not found:
        raise UserError(f"{key}={text}: must be a size such as 200GB, 500MB or a number of bytes")
    return int(Decimal(found[1]) * SIZES[found[2].upper()]) if found else None


def short(images: int) -> str:
    """The shortest typed form of a number of images: `2M`, `250k`, `1234`."""
    for unit in ("M", "k"):
        if images and images % UNITS[unit] == 0:
            return f"{images // UNITS[unit]}{unit}"
    return str(images)

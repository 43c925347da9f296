"""How a wrong setting is refused: one line that names the key, the value found and what is wanted."""

from __future__ import annotations

import reprlib
import sys
from collections.abc import Collection
from numbers import Integral, Real

from ldm_lab.errors import UserError


def require(condition: bool, key: str, value: object, wanted: str) -> None:
    """Raise a one-line `UserError` about `key` unless `condition` holds.

    >>> require(False, "eta", -1.0, "at least 0")
    Traceback (most recent call last):
    UserError: eta=-1.0 is not allowed: it must be at least 0
    """
    if not condition:
        raise UserError(f"{key}={reprlib.repr(value)} is not allowed: it must be {wanted}")


def require_choice(key: str, value: object, choices: Collection[str]) -> None:
    """Raise a `UserError` unless `value` is one of the names in `choices`."""
    require(isinstance(value, str) and value in choices, key, value, "one of " + ", ".join(choices))


def is_number(value: object) -> bool:
    """Whether `value` is a finite number: neither text, nor a truth value, nor missing, nor NaN."""
    return isinstance(value, Real) and not isinstance(value, bool) and bool(abs(value) <= sys.float_info.max)


def is_integer(value: object) -> bool:
    """Whether `value` is a whole number; `True` is not."""
    return isinstance(value, Integral) and not isinstance(value, bool)

"""Checks of arguments; the one-line error names the key, the value and the allowed values."""

from __future__ import annotations

import operator
import reprlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, SupportsIndex, TypeVar

from ldm_lab.utils.errors import UserError
from ldm_lab.utils.reading import MAX_LAYERS, MAX_LEVELS, MAX_SIDE, MAX_WIDTH

T = TypeVar("T")


def require(condition: bool, key: str, value: object, wanted: str) -> None:
    """Raise a one-line `UserError` about `key` unless `condition` holds.

    >>> require(False, "eta", -1.0, "at least 0")
    Traceback (most recent call last):
    UserError: eta=-1.0 is not allowed: it must be at least 0
    """
    if not condition:
        raise UserError(f"{key}={reprlib.repr(value)} is not allowed: it must be {wanted}")


def require_choice(key: str, value: Any, choices: Iterable[Any]) -> None:  # noqa: ANN401
    """Raise `UserError` unless `value` is one of `choices`."""
    choices = list(choices)
    if value not in choices:
        raise UserError(f"{key}={reprlib.repr(value)} is not supported: use {' or '.join(map(repr, choices))}")


def require_positive(maximum: int = MAX_WIDTH, **values: int) -> None:
    """Raise `UserError` unless every value is an integer in 1..`maximum`."""
    for key, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{key}={value!r} is not a positive integer")
        if value > maximum:
            raise UserError(f"{key}={value} is more than the {maximum} that are possible")


def whole(key: str, value: SupportsIndex) -> int:
    """A positive integer of any library, also numpy's and torch's. Raises `UserError` unless it is above 0."""
    try:
        number = operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise UserError(f"{key} is {value!r}, must be a positive integer")
    return number


def require_bool(**values: bool) -> None:
    """Raise `UserError` unless every value is True or False, as the string "false" would count as true."""
    for key, value in values.items():
        if not isinstance(value, bool):
            raise UserError(f"{key}={value!r} must be true or false")


def require_number(low: float, high: float, **values: float) -> None:
    """Raise `UserError` unless every value is a number in [low, high); NaN is in no range."""
    for key, value in values.items():
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not low <= value < high:
            raise UserError(f"{key}={value!r} must be a number, at least {low:g} and below {high:g}")


def require_scale(scaling_factor: float) -> None:
    """Raise `UserError` unless float32 latents can be multiplied and divided by the scaling factor."""
    require_number(1e-6, 1e6, scaling_factor=scaling_factor)


def require_sample_size(sample_size: Any) -> None:  # noqa: ANN401
    """Raise `UserError` unless it is None, one side, or (height, width), in pixels or latent positions."""
    sides = sample_size if isinstance(sample_size, (list, tuple)) else [sample_size]
    if isinstance(sample_size, (list, tuple)) and len(sides) != 2:
        raise UserError(f"sample_size={sample_size!r} must be one number, or height and width")
    for side in [] if sample_size is None else sides:
        require_positive(MAX_SIDE, sample_size=side)


def require_divides(key: str, value: int, width: int) -> None:
    """Raise `UserError` unless `value` divides the width of a block."""
    if width % value:
        raise UserError(f"{key}={value} does not divide {width}, a width of block_out_channels")


def by_block(key: str, types: Sequence[str], known: Mapping[str, T]) -> list[T]:
    """Look up each block type in `known`.

    Model folders of 2022 prefix some types with "UNetRes", which has no meaning.
    """
    for name in types:
        if not isinstance(name, str):
            raise UserError(f"{key} holds {name!r}, which is no name of a block")
    names = [name.removeprefix("UNetRes") for name in types]
    for name in names:
        require_choice(key, name, known)
    return [known[name] for name in names]


def require_widths(block_out_channels: Sequence[int], norm_num_groups: int, **block_types: Sequence[str]) -> None:
    """Raise `UserError` unless each block has one width, and `norm_num_groups` divides every width."""
    for key, value in {"block_out_channels": block_out_channels, **block_types}.items():
        if not isinstance(value, (list, tuple)) or len(value) > MAX_LEVELS:
            raise UserError(f"{key}={value!r} must be a list of at most {MAX_LEVELS} entries")
    widths = list(block_out_channels)
    for key, types in block_types.items():
        if len(types) != len(widths):
            raise UserError(f"{key} has {len(types)} entries, block_out_channels={widths} has {len(widths)}")
    if not widths:
        raise UserError("block_out_channels is empty: it needs the width of at least one block")
    require_positive(norm_num_groups=norm_num_groups)
    for width in widths:
        require_positive(block_out_channels=width)
        require_divides("norm_num_groups", norm_num_groups, width)


def require_architecture(config: Mapping[str, Any]) -> None:
    """Raise `UserError` unless the arguments that an autoencoder shares with the UNet fit together."""
    require_positive(in_channels=config["in_channels"], out_channels=config["out_channels"])
    require_positive(MAX_LAYERS, layers_per_block=config["layers_per_block"])
    types = {key: config[key] for key in ("down_block_types", "up_block_types")}
    require_widths(config["block_out_channels"], config["norm_num_groups"], **types)
    require_sample_size(config["sample_size"])


def require_input(shape: Sequence[int], channels: int, factor: int, owner: str) -> None:
    """Raise `UserError` unless `shape` is `(B, channels, H, W)` with H and W multiples of `factor`."""
    if len(shape) != 4 or shape[1] != channels:
        raise UserError(f"{owner} takes (B, {channels}, H, W), got a tensor of shape {tuple(shape)}")
    height, width = shape[2:]
    if height % factor or width % factor:
        raise UserError(f"{owner} takes heights and widths that are multiples of {factor}, got {height}x{width}")


def is_number(value: object) -> bool:
    """Whether `value` is a finite number: not a string, a boolean, None or NaN."""
    return isinstance(value, Real) and not isinstance(value, bool) and bool(abs(value) <= sys.float_info.max)


def is_integer(value: object) -> bool:
    """Whether `value` is an integer; `True` is not."""
    return isinstance(value, Integral) and not isinstance(value, bool)

"""Shared parts of all translations: checks of arguments, and renaming of tensors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from ldm_lab.utils.reading import MAX_CODES, MAX_LAYERS, MAX_LEVELS, MAX_WIDTH, LoadError

ITSELF = {"": ""}  # the empty name stands for the module itself
CONV = {"conv": "conv"}

_MAXIMA = {"num_res_blocks": MAX_LAYERS, "n_embed": MAX_CODES}

Module = tuple[str, str, dict[str, str]]  # CompVis's prefix, our prefix, and names below it: CompVis's -> ours


def check(owner: str, params: dict[str, Any], needed: tuple[str, ...], fixed: dict[str, tuple | None]) -> None:
    """Raise `LoadError` if an argument of `owner` is missing, unknown, or not a value that `fixed` allows."""
    for key in needed:
        if key not in params:
            raise LoadError(f"{owner}: the key {key!r} is missing")
    for key, value in params.items():
        if key not in needed and key not in fixed:
            raise LoadError(f"{owner}: {key}={value!r} is not a key that is understood")
        if fixed.get(key) is not None and value not in fixed[key]:
            raise LoadError(f"{owner}: {key}={value!r} is not supported; {' or '.join(map(repr, fixed[key]))} is")


def check_sizes(owner: str, params: dict[str, Any], numbers: Iterable[str], lists: Iterable[str] = ()) -> None:
    """Raise `LoadError` unless `numbers` are positive integers, and `lists` lists of such, within the limits.

    Tensor names follow from these arguments, so they need a bound before any network is built.
    """
    for key in numbers:
        maximum = _MAXIMA.get(key, MAX_WIDTH)
        if not _is_size(params[key], maximum):
            raise LoadError(f"{owner}: {key}={params[key]!r} must be a positive integer, at most {maximum}")
    for key in lists:
        value = params.get(key, [])
        possible = isinstance(value, (list, tuple)) and len(value) <= MAX_LEVELS
        if not possible or not all(_is_size(item, MAX_WIDTH) for item in value):
            raise LoadError(f"{owner}: {key}={value!r} must be a list of positive integers, at most {MAX_LEVELS}")


def check_first(owner: str, key: str, multipliers: Sequence[int]) -> None:
    """Raise `LoadError` if the first convolution is not as wide as the first level, as in our networks it is."""
    if not multipliers or multipliers[0] != 1:
        raise LoadError(f"{owner}: {key}={list(multipliers)!r} is not supported; a list that begins with 1 is")


def _is_size(value: Any, maximum: int) -> bool:  # noqa: ANN401
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= maximum


def rename(state: dict[str, Tensor], modules: Iterable[Module], network: str) -> dict[str, Tensor]:
    """Every tensor of `state` under its new name; loading the weights finds missing tensors."""
    names = {
        _join(theirs, part, kind): _join(ours, our_part, kind)
        for theirs, ours, parts in modules
        for part, our_part in parts.items()
        for kind in ("weight", "bias")
    }
    if unknown := sorted(set(state) - set(names)):
        raise LoadError(f"CompVis tensor {unknown[0]!r} has no counterpart in {network} ({len(unknown)} such)")
    return {names[key]: value for key, value in state.items()}


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def linear(value: Tensor) -> Tensor:
    """Weight of a 1x1 convolution (CompVis's attention) -> of a linear layer (ours): `(C, C, 1[, 1]) -> (C, C)`."""
    return value.flatten(1) if value.ndim > 1 else value

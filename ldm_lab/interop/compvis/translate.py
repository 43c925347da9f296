"""What the translations of all networks share: checked arguments, renamed tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm_lab.serialization import LoadError

ITSELF = {"": ""}  # the empty name stands for the module itself
CONV = {"conv": "conv"}

Module = tuple[str, str, dict[str, str]]  # their prefix, our prefix, and the names below, theirs -> ours


@contextmanager
def blaming(path: str | Path) -> Iterator[None]:
    """What fails in this block fails for what a file says: a `LoadError` that names it."""
    try:
        yield
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise LoadError(f"{path}: {error}") from error


def check(owner: str, params: dict[str, Any], needed: tuple[str, ...], fixed: dict[str, tuple | None]) -> None:
    """Raise `LoadError` where an argument of `owner` is missing, unknown, or none of the values that `fixed` allows."""
    for key in needed:
        if key not in params:
            raise LoadError(f"{owner}: the key {key!r} is missing")
    for key, value in params.items():
        if key not in needed and key not in fixed:
            raise LoadError(f"{owner}: {key}={value!r} is not a key that is understood")
        if fixed.get(key) is not None and value not in fixed[key]:
            raise LoadError(f"{owner}: {key}={value!r} is not supported; {' or '.join(map(repr, fixed[key]))} is")


def rename(state: dict[str, Tensor], modules: Iterable[Module], network: str) -> dict[str, Tensor]:
    """Every tensor of `state` under its new name; which of ours are missing is found when they are loaded."""
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
    """Their attention projects with 1x1 convolutions, ours with linear layers: `(C, C, 1[, 1]) -> (C, C)`."""
    return value.flatten(1) if value.ndim > 1 else value

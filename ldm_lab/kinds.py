"""Whether values are of the kinds that classes declare: those of a config against the annotations of constructors."""

from __future__ import annotations

import functools
import importlib
import inspect
import math
import types
import typing
from typing import Any

from ldm_lab.errors import UserError
from ldm_lab.settings import MOST, find, shown, targets

WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", types.NoneType: "null"}
# Arguments of this package that count something: 1 at least. Its other whole numbers are not negative.
COUNTS = (
    "every_images", "images", "steps", "frames", "samples", "nearest", "among", "side", "bars", "patience", "num_train",
    "num_val", "num_codes", "num_samples", "num_reference", "max_images", "levels",
)  # fmt: skip
OPEN = ("model.unet.in_channels", "model.unet.out_channels")  # null: those of the latents


def check(config: dict[str, Any]) -> None:
    """Refuse arguments of another kind than declared, and counts out of range, before anything is built.

    Args:
        config: resolved, as plain data; its classes are imported, so they must be allowed (see `settings.check_code`).

    Raises:
        UserError: an argument is of another kind; the message names the shortest key that it has.
    """
    for place, target in targets(config):
        node = place.removesuffix("._target_")
        for name, value in (find(config, node) or {}).items():
            kinds = declared(target).get(name)
            low = (1 if name in COUNTS else 0) if target.startswith(f"{__package__}.") else -MOST
            if kinds is None or isinstance(value, (dict, list)) or (value is None and f"{node}.{name}" in OPEN):
                continue
            if not any(_fits(value, kind) for kind in kinds):
                wanted = " or ".join(WORDS.get(kind, "a value") for kind in kinds)
                raise UserError(f"{_shortest(config, f'{node}.{name}')}={shown(value)}: must be {wanted}")
            if type(value) is int and value < low and not node.startswith("trainer"):
                raise UserError(f"{_shortest(config, f'{node}.{name}')}={value}: must be at least {low}")


def _fits(value: Any, kind: Any) -> bool:  # noqa: ANN401
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    if kind in WORDS:
        return type(value) is kind and (kind is not int or abs(value) <= MOST)
    return kind is Any or value is not None  # of other kinds, what is given is the constructor's to judge


def _shortest(config: dict[str, Any], key: str) -> str:
    """What a user types: `data.module.train_set.flip` takes its value from `data.flip`, every seed from `seed`."""
    name = key.rpartition(".")[2]
    short = name if name == "seed" else f"{key.split('.')[0]}.{name}"
    return short if repr(find(config, short, ...)) == repr(find(config, key)) else key


@functools.cache
def declared(target: str) -> dict[str, tuple[Any, ...]]:
    """Argument -> the kinds that its annotation allows; arguments without one are left out."""
    module, _, name = target.rpartition(".")
    try:
        made = getattr(importlib.import_module(module), name)
    except Exception:  # whatever an import may raise: whoever builds it says so
        return {}
    found: dict[str, tuple[Any, ...]] = {}
    known: set[str] = set()
    for owner in made.__mro__ if inspect.isclass(made) else (made,):
        function = vars(owner).get("__init__") if inspect.isclass(owner) else owner
        if not inspect.isfunction(function):
            continue
        hints, parameters = _hints(function), inspect.signature(function).parameters
        found |= {name: _alternatives(hints[name]) for name in parameters if name in hints and name not in known}
        known |= set(parameters)
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            break  # nothing goes to the constructor of the base
    return found


def _hints(function: Any) -> dict[str, Any]:  # noqa: ANN401
    try:
        return typing.get_type_hints(function)
    except (NameError, TypeError, AttributeError):  # names that are imported for a type checker alone
        return {}


def _alternatives(hint: Any) -> tuple[Any, ...]:  # noqa: ANN401
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return typing.get_args(hint)
    return (hint,)

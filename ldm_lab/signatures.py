"""Whether a callable takes the arguments that a user has chosen, asked before it is called."""

from __future__ import annotations

import collections.abc
import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from types import UnionType
from typing import Any

from ldm_lab.errors import UserError

VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
PLAIN = (type(None), bool, int, float, str, list, dict)  # what a config holds


def check(make: Callable[..., Any], args: Sequence[Any], settings: Mapping[str, Any]) -> None:
    """Compare arguments with a signature; of callables of this package also plain data with its annotations.

    Raises:
        UserError: one is unknown, missing, or of another type.
    """
    try:
        parameters, hints = _parameters(make)
    except (TypeError, ValueError):  # some that are built in have none
        return
    signature = inspect.Signature(sorted(parameters.values(), key=lambda parameter: parameter.kind))
    try:
        signature.bind_partial(*args, **settings)  # a name that is unknown tells more than one that is missing
        given = signature.bind(*args, **settings).arguments
    except TypeError as error:
        name = getattr(make, "__qualname__", type(make).__name__)
        raise UserError(f"{name}: {error}; it takes {', '.join(parameters)}") from error
    for name, value in given.items():
        if parameters[name].kind not in VARIADIC and not fits(value, hints.get(name, Any)):
            raise UserError(f"{name}={value!r}: must be {_words(hints[name])}")


def _parameters(make: Callable[..., Any]) -> tuple[dict[str, inspect.Parameter], dict[str, Any]]:
    """What a callable takes, by name, and the types of that; of a class of ours also what it hands to its bases.

    Whether a class of others hands its `**more` to its bases nobody knows, nor how strict its annotations are.
    """
    parameters = dict(inspect.signature(make).parameters)
    if package(make) != __package__:
        return parameters, {}
    if not isinstance(make, type):
        return parameters, typing.get_type_hints(make)
    hints = typing.get_type_hints(make.__init__)
    for base in make.__mro__[1:]:
        more = [name for name, parameter in parameters.items() if parameter.kind is inspect.Parameter.VAR_KEYWORD]
        if not more or "__init__" not in vars(base):
            continue
        del parameters[more[0]]
        _, *theirs = inspect.signature(base.__init__).parameters.values()
        for parameter in theirs:
            kind = parameter.kind if parameter.kind in VARIADIC else inspect.Parameter.KEYWORD_ONLY
            parameters.setdefault(parameter.name, parameter.replace(kind=kind))
        hints = typing.get_type_hints(base.__init__) | hints
    return parameters, hints


def package(make: Callable[..., Any]) -> str:
    """The package that a callable belongs to; "" where it does not say."""
    return str(getattr(make, "__module__", None) or "").split(".")[0]


def fits(value: Any, hint: Any) -> bool:  # noqa: ANN401
    """Whether plain data is of an annotated type; objects, and types that say too little, pass."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if not isinstance(value, PLAIN) or hint is Any:
        return True
    if origin in (typing.Union, UnionType):
        return any(fits(value, one) for one in inner)
    if origin is collections.abc.Callable:
        return False
    if origin in (list, tuple, collections.abc.Sequence):
        return isinstance(value, list) and all(fits(item, inner[0]) for item in value)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    kind = origin or hint
    return isinstance(value, kind) if isinstance(kind, type) else True


def _words(hint: Any) -> str:  # noqa: ANN401
    """An annotation as a message says it: `int, list of int or None`."""
    inner = [_words(one) for one in typing.get_args(hint)]
    if typing.get_origin(hint) in (typing.Union, UnionType):
        return f"{', '.join(inner[:-1])} or {inner[-1]}"
    if typing.get_origin(hint) in (list, tuple, collections.abc.Sequence):
        return f"list of {inner[0]}"
    return "None" if hint is type(None) else getattr(hint, "__name__", str(hint))

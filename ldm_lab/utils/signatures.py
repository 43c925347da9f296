"""What callables take, asked before a user's values are handed over: names, defaults and types of arguments."""

from __future__ import annotations

import collections.abc
import functools
import importlib
import inspect
import math
import typing
from collections.abc import Callable, Mapping, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal

from typing_extensions import is_protocol

from ldm_lab.utils.errors import UserError
from ldm_lab.utils.limits import AtLeast, Given
from ldm_lab.utils.nested import shown

MOST = 2**63 - 1  # the largest whole number that torch takes
MORE = inspect.Parameter.VAR_KEYWORD
VARIADIC = (inspect.Parameter.VAR_POSITIONAL, MORE)
PLAIN = (NoneType, bool, int, float, str, list, dict)  # what a config holds
WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    NoneType: "null",
    Given: "given a value",
}


def named(target: str) -> Any:  # noqa: ANN401
    """What a `_target_` names; `None` where it cannot be imported, of which whoever builds it says more."""
    module, _, name = target.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name, None)
    except Exception:  # whatever an import may raise
        return None


def check(make: Callable[..., Any], args: Sequence[Any], settings: Mapping[str, Any]) -> None:
    """Compare arguments with a signature, and plain data with annotations, of other packages only with limits.

    Whether a class of others hands its `**more` to its bases nobody knows, nor how strict its other annotations are.

    Raises:
        UserError: one is unknown, missing, or of another type.
    """
    try:
        parameters, hints = declared(make)
        if package(make) != package(check):
            parameters = dict(inspect.signature(make).parameters)
            hints = {name: hint for name, hint in hints.items() if any(isinstance(m, AtLeast) for m in marks(hint))}
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
        if parameters[name].kind not in VARIADIC and (wanted := wrong(value, hints.get(name, Any))):
            raise UserError(f"{name}={value!r}: {wanted}")


def hints(target: str) -> dict[str, Any]:
    """Argument -> annotation, of what a `_target_` names; arguments that have none are left out."""
    try:
        return declared(named(target))[1]
    except (TypeError, ValueError):  # there is no such thing, or it has no signature
        return {}


@functools.cache
def declared(make: Callable[..., Any]) -> tuple[dict[str, inspect.Parameter], dict[str, Any]]:
    """The arguments of a callable by name, and their types; of a class also those that `**more` hands to its bases.

    Raises:
        TypeError, ValueError: it has no signature.
    """
    parameters = dict(inspect.signature(make).parameters)
    if not isinstance(make, type):
        return parameters, _hints(make)
    hints = _hints(make.__init__)
    for base in make.__mro__[1:]:
        more = [name for name, parameter in parameters.items() if parameter.kind is MORE]
        if not more or "__init__" not in vars(base):
            continue
        del parameters[more[0]]
        _, *theirs = inspect.signature(base.__init__).parameters.values()
        for parameter in theirs:
            kind = parameter.kind if parameter.kind in VARIADIC else inspect.Parameter.KEYWORD_ONLY
            parameters.setdefault(parameter.name, parameter.replace(kind=kind))
        hints = _hints(base.__init__) | hints
    return parameters, hints


def _hints(function: Any) -> dict[str, Any]:  # noqa: ANN401
    try:
        return typing.get_type_hints(function, include_extras=True)
    except (NameError, TypeError, AttributeError):  # names that are imported for a type checker alone
        return {}


def package(make: Callable[..., Any]) -> str:
    """The package that a callable belongs to; "" where it does not say."""
    return str(getattr(make, "__module__", None) or "").split(".")[0]


def require(key: str, value: Any, hint: Any) -> None:  # noqa: ANN401
    """Raise `UserError`, one line that names `key`, unless a value is of an annotated type and in its limits."""
    if wanted := wrong(value, hint):
        raise UserError(f"{key}={shown(value)}: {wanted}")


def wrong(value: Any, hint: Any) -> str:  # noqa: ANN401
    """How a message goes on about a value that does not fit: `must be a whole number, at least 1`; "" where it does."""
    if fits(value, hint):
        return ""
    choices = hint.__origin__ if typing.get_origin(hint) is Annotated else hint
    if typing.get_origin(choices) is Literal:
        *first, last = map(shown, typing.get_args(choices))
        return f"give {', '.join(first)} or {last}"
    too_large = type(value) is int and value > MOST and fits(MOST, hint)
    return f"must be {words(hint)}" + (f", at most {MOST}" if too_large else "")


def fits(value: Any, hint: Any) -> bool:  # noqa: ANN401
    """Whether plain data is of an annotated type and in its limits; objects, and types that say too little, pass."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if not isinstance(value, PLAIN) or hint is Any:
        return True
    if origin is Annotated:
        return fits(value, inner[0]) and all(limit.allows(value) for limit in _limits(hint))
    if origin in (typing.Union, UnionType):
        return any(fits(value, one) for one in inner)
    if origin is Literal:
        return value in inner
    if origin is collections.abc.Callable or is_protocol(hint):
        return False
    if origin in (list, tuple, collections.abc.Sequence):
        return isinstance(value, list) and all(fits(item, inner[0]) for item in value)
    if hint is Given:
        return value is not None
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)
    if hint is int:
        return type(value) is int and abs(value) <= MOST
    kind = origin or hint
    return isinstance(value, kind) if isinstance(kind, type) else True


def words(hint: Any) -> str:  # noqa: ANN401
    """An annotation as a message says it: `a whole number, at least 1 or list of a whole number or null`."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        comma = "," if inner[0] is int else ""
        return "".join([words(inner[0]), *(f"{comma} {limit}" for limit in _limits(hint))])
    if origin in (typing.Union, UnionType):
        return " or ".join(map(words, inner))
    if origin is Literal:
        return " or ".join(map(shown, inner))
    if origin in (list, tuple, collections.abc.Sequence):
        return f"list of {words(inner[0])}"
    return WORDS.get(hint) or getattr(hint, "__name__", str(hint))


def _limits(hint: Any) -> list[AtLeast]:  # noqa: ANN401
    return [mark for mark in hint.__metadata__ if isinstance(mark, AtLeast)]


def marks(hint: Any) -> list[Any]:  # noqa: ANN401
    """All that `Annotated` says in an annotation and its parts: limits, and `Harmless`."""
    return [*getattr(hint, "__metadata__", ()), *(mark for one in typing.get_args(hint) for mark in marks(one))]

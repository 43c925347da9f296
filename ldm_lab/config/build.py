"""Builds the objects that the `_target_` nodes of a config describe."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from ldm_lab.config.files import ConfigError
from ldm_lab.utils import signatures
from ldm_lab.utils.errors import UserError, doing, one_line

LIBRARIES = ("torch", "lightning")  # a config may name some of their public classes (see `checks.PUBLIC`)


def plain(config: DictConfig) -> dict[str, Any]:
    """Resolve a config, and convert it to dicts, lists, strings and numbers."""
    return OmegaConf.to_container(config, resolve=True)  # type: ignore[return-value]


def build(node: DictConfig | None, where: str, **parts: Any) -> Any:  # noqa: ANN401
    """Build the object that a `_target_` node describes, and the objects inside; ignores the node's own `_partial_`.

    Args:
        node: the node; `None` gives `None`.
        where: the node's key, for error messages.
        parts: built objects, which replace the node's own entries.

    Raises:
        ConfigError: the class does not exist, does not take these arguments, or raised a `UserError`; or a class of
            torch or Lightning rejected its arguments. Other exceptions of constructors are bugs, and pass.
    """
    if node is None:
        return None
    own = {key: value for key, value in plain(node).items() if key not in parts}
    return _build_nested({**own, "_partial_": False}, where, parts)


def build_all(nodes: DictConfig, where: str) -> list[Any]:
    """Build the objects of a group such as `callbacks`; skips nodes without `_target_`: their object is not chosen."""
    return [build(node, f"{where}.{name}") for name, node in nodes.items() if node and "_target_" in node]


def _build_nested(node: Any, where: str, parts: dict[str, Any]) -> Any:  # noqa: ANN401
    """Plain data with the built object in place of each `_target_` node."""
    if isinstance(node, list):
        return [_build_nested(item, f"{where}.{place}", {}) for place, item in enumerate(node)]
    if not isinstance(node, dict):
        return node
    entries = {key: _build_nested(value, f"{where}.{key}", {}) for key, value in node.items()} | parts
    if "_target_" not in entries:
        return entries
    target, partial, positional = entries.pop("_target_"), entries.pop("_partial_", False), entries.pop("_args_", ())
    call = functools.partial(_call, _locate(target, where), where, *positional)
    return functools.partial(call, **entries) if partial else call(**entries)


def _locate(target: str, where: str) -> Callable[..., Any]:
    """The callable that a `_target_` names, as a partial of Hydra, which rejects the callables on its blocklist."""
    module = target.rpartition(".")[0]
    try:
        with doing(f"importing {module} for {where}"):
            importlib.import_module(module)
        return instantiate({"_target_": target, "_partial_": True})
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):  # the module exists, but imports a missing one
            raise
        raise ConfigError(f"{where}: _target_={target}: {error}") from error
    except InstantiationException as error:
        raise ConfigError(f"{where}: {one_line(error.__cause__ or error)}") from error


def _call(make: Callable[..., Any], where: str, /, *args: Any, **settings: Any) -> Any:  # noqa: ANN401
    target = make.func  # the callable in Hydra's partial
    try:
        signatures.check(target, args, settings)
        with doing(f"building {where}"):
            return make(*args, **settings)
    except Exception as error:
        if not _is_refusal(error, target):
            raise
        raise ConfigError(f"{where}: {one_line(error)}") from error


def _is_refusal(error: Exception, target: Callable[..., Any]) -> bool:
    """Whether an exception is about the user's values; libraries have no exception class of their own for this."""
    if signatures.package(target) not in LIBRARIES:
        return isinstance(error, (UserError, InstantiationException))
    refusals = (ValueError, TypeError, LookupError)
    return isinstance(error, refusals) or type(error).__name__ == "MisconfigurationException"

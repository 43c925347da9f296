"""From a `_target_` node of a config to the object that it describes."""

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

LIBRARIES = ("torch", "lightning")  # of whose public classes a config may name some (see `checks.PUBLIC`)


def plain(config: DictConfig) -> dict[str, Any]:
    """A resolved config as dicts, lists, strings and numbers."""
    return OmegaConf.to_container(config, resolve=True)  # type: ignore[return-value]


def build(node: DictConfig | None, where: str, **parts: Any) -> Any:  # noqa: ANN401
    """Make the object that a `_target_` node describes, even one with `_partial_`, and those that it holds.

    Args:
        node: the node; `None` gives `None`.
        where: its key, for the message.
        parts: built objects, which take the place of the node's own entries.

    Raises:
        ConfigError: there is no such class, it takes no such arguments, it has raised a `UserError`, or, of a class of
            torch or Lightning, it has refused its arguments. What else a constructor raises passes: it is no mistake
            in the config.
    """
    if node is None:
        return None
    own = {key: value for key, value in plain(node).items() if key not in parts}
    return _made({**own, "_partial_": False}, where, parts)


def build_all(nodes: DictConfig, where: str) -> list[Any]:
    """The objects of a group such as `callbacks`; one without a `_target_` sets values of one that is not there."""
    return [build(node, f"{where}.{name}") for name, node in nodes.items() if node and "_target_" in node]


def _made(node: Any, where: str, parts: dict[str, Any]) -> Any:  # noqa: ANN401
    """Plain data with an object in the place of each `_target_` node."""
    if isinstance(node, list):
        return [_made(item, f"{where}.{place}", {}) for place, item in enumerate(node)]
    if not isinstance(node, dict):
        return node
    made = {key: _made(value, f"{where}.{key}", {}) for key, value in node.items()} | parts
    if "_target_" not in made:
        return made
    target, partial, positional = made.pop("_target_"), made.pop("_partial_", False), made.pop("_args_", ())
    call = functools.partial(_call, _found(target, where), where, *positional)
    return functools.partial(call, **made) if partial else call(**made)


def _found(target: str, where: str) -> Callable[..., Any]:
    """What a `_target_` names; Hydra's own list of what no config may call holds too."""
    module = target.rpartition(".")[0]
    try:
        with doing(f"importing {module} for {where}"):
            importlib.import_module(module)
        return instantiate({"_target_": target, "_partial_": True})
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):  # it is there, and what it needs is not
            raise
        raise ConfigError(f"{where}: _target_={target}: {error}") from error
    except InstantiationException as error:
        raise ConfigError(f"{where}: {one_line(error.__cause__ or error)}") from error


def _call(make: Callable[..., Any], where: str, /, *args: Any, **settings: Any) -> Any:  # noqa: ANN401
    target = make.func  # of Hydra's partial
    try:
        signatures.check(target, args, settings)
        with doing(f"building {where}"):
            return make(*args, **settings)
    except Exception as error:
        if not _is_refusal(error, target):
            raise
        raise ConfigError(f"{where}: {one_line(error)}") from error


def _is_refusal(error: Exception, target: Callable[..., Any]) -> bool:
    """Whether an exception is about what the user has chosen. Libraries have no class of their own for that."""
    if signatures.package(target) not in LIBRARIES:
        return isinstance(error, (UserError, InstantiationException))
    refusals = (ValueError, TypeError, LookupError)
    return isinstance(error, refusals) or type(error).__name__ == "MisconfigurationException"

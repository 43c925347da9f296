"""Compares a run's config, perhaps of an older version of this package, with the current config.

Versions add and drop keys. A key that a config lacks means the constructor's own default, not the value in today's
YAML files.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from ldm_lab.runs.settings import is_harmless
from ldm_lab.utils import signatures
from ldm_lab.utils.moved import current
from ldm_lab.utils.nested import find, flatten, targets

MISSING = inspect.Parameter.empty
OPEN = signatures.MORE


@dataclass
class Changes:
    """Settings that differ from the run's and are not `Harmless`.

    Attributes:
        changed: changed settings, as `key: old -> new`.
        added: new keys that have their default, as `key=value`.
        dropped: keys that no longer exist, as `key=value`.
    """

    changed: list[str] = field(default_factory=list)
    added: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)


def compare(old: dict[str, Any], new: dict[str, Any], typed: Collection[str] = ()) -> Changes:
    """The changes from one resolved config to another.

    Args:
        old: config that the run was started with, perhaps by an older version.
        new: current config.
        typed: keys that the user has set for this command; their values are no defaults.
    """
    changes, before, after = Changes(), _flat(old), _flat(new)
    for key in {**before, **after}:
        if is_harmless(key, new) or (key in before and key in after and before[key] == after[key]):
            continue
        lacking, having = (old, new) if key not in before else (new, old)
        place = first_lacking(lacking, key)
        default = None if place is None else default_of(new, place)
        if place is not None and default == find(having, place):
            continue
        if lacking is old and default in (MISSING, OPEN) and key not in typed:
            changes.added.append(f"{key}={after[key]}")
        elif lacking is new and default is MISSING:
            changes.dropped.append(f"{key}={before[key]}")
        else:
            changes.changed.append(f"{key}: {before.get(key)} -> {after.get(key)}")
    return changes


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    """The values of a config by dotted key, with the current names of moved classes."""
    flat = flatten(config)
    return {key: current(value) if key.endswith("_target_") else value for key, value in flat.items()}


def first_lacking(tree: dict[str, Any], key: str) -> str | None:
    """The shortest prefix of a dotted key that a tree lacks; `None` if there is a value at the key, or above it."""
    node: Any = tree
    parts = key.split(".")
    for depth, part in enumerate(parts, start=1):
        if not isinstance(node, dict):
            return None
        if part not in node:
            return ".".join(parts[:depth])
        node = node[part]
    return None


def default_of(config: dict[str, Any], key: str) -> Any:  # noqa: ANN401
    """The default of argument `key` of the constructor that the parent node of `key` names.

    If the parent names none, as `data` of `data.channels`: the default of the constructors below it. `MISSING`: there
    is no constructor, or `key` is required or unknown. `OPEN`: the constructor takes any key.
    """
    parent, _, name = key.rpartition(".")
    makes = signatures.named(str(find(config, f"{parent}._target_")))
    if makes is None:
        return _default_below(config, parent, name)
    parameters, _ = signatures.declared(makes)
    if name in parameters:
        default = parameters[name].default
        return list(default) if isinstance(default, tuple) else default
    return OPEN if any(parameter.kind is OPEN for parameter in parameters.values()) else MISSING


def _default_below(config: dict[str, Any], parent: str, name: str) -> Any:  # noqa: ANN401
    """The default that all constructors below a node have for argument `name`; `MISSING` if they differ, or have none.

    Their arguments follow the node's key: `channels: ${data.channels}`.
    """
    below = [signatures.named(str(target)) for _, target in targets(find(config, parent))]
    declared = [signatures.declared(makes)[0] for makes in below if makes is not None]
    defaults = [parameters[name].default for parameters in declared if name in parameters]
    return defaults[0] if defaults and all(default == defaults[0] for default in defaults) else MISSING

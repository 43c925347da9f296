"""Which settings of a run have changed, where its config may be of an older version of this package.

A version adds keys, and drops some. A key that a config lacks stands for what the constructor does without it: its own
default, and not what today's YAML files say.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from ldm_lab.runs.settings import is_harmless
from ldm_lab.utils import signatures
from ldm_lab.utils.moved import current
from ldm_lab.utils.nested import find, flatten

MISSING = inspect.Parameter.empty
OPEN = signatures.MORE


@dataclass
class Changes:
    """Settings that matter and are not those of before.

    Attributes:
        changed: `key: old -> new`.
        added: `key=value` that was not known before, and has its default now.
        dropped: `key=value` that is not known any more.
    """

    changed: list[str] = field(default_factory=list)
    added: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)


def compare(old: dict[str, Any], new: dict[str, Any], typed: Collection[str] = ()) -> Changes:
    """What has changed from one config to another.

    Args:
        old: as the run was started, resolved, perhaps by an older version.
        new: of now.
        typed: keys that the user has given a value now: theirs are no defaults.
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
    """Its values by dotted key; classes under the names that they have today."""
    flat = flatten(config)
    return {key: current(value) if key.endswith("_target_") else value for key, value in flat.items()}


def first_lacking(tree: dict[str, Any], key: str) -> str | None:
    """The shortest part of a dotted key that a tree does not have; `None` where it has a value in that place."""
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
    """What the constructor of the node around `key` takes where it is not given.

    `MISSING`: there is none, it asks for the key, or does not know it; `OPEN`: it takes any key.
    """
    parent, _, name = key.rpartition(".")
    makes = signatures.named(str(find(config, f"{parent}._target_")))
    if makes is None:
        return MISSING
    parameters, _ = signatures.declared(makes)
    if name in parameters:
        default = parameters[name].default
        return list(default) if isinstance(default, tuple) else default
    return OPEN if any(parameter.kind is OPEN for parameter in parameters.values()) else MISSING

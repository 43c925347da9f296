"""Access to nested plain data, such as a resolved config, by dotted keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def find(tree: dict[str, Any], key: str, absent: Any = None) -> Any:  # noqa: ANN401
    """The value at a dotted key, or `absent` if there is none."""
    node: Any = tree
    for part in key.split("."):
        node = node.get(part, absent) if isinstance(node, dict) else absent
    return node


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:  # noqa: ANN401
    """A nested dict as `{"a.b": value}`."""
    if not isinstance(tree, dict) or not tree:
        return {prefix[:-1]: tree}
    return {key: value for name, child in tree.items() for key, value in flatten(child, f"{prefix}{name}.").items()}


def targets(tree: Any, prefix: str = "") -> Iterator[tuple[str, str]]:  # noqa: ANN401
    """Every `_target_` of nested data with its key."""
    if isinstance(tree, dict):
        for key, child in tree.items():
            if key == "_target_":
                yield f"{prefix}{key}", str(child)
            else:
                yield from targets(child, f"{prefix}{key}.")
    elif isinstance(tree, list):
        for place, child in enumerate(tree):
            yield from targets(child, f"{prefix}{place}.")


def shown(value: Any) -> str:  # noqa: ANN401
    """A value as the user would type it."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)

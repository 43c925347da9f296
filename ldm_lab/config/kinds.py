"""Checks the arguments of components against the types and limits that their constructors declare."""

from __future__ import annotations

from typing import Any

from ldm_lab.runs.settings import SETTINGS
from ldm_lab.utils import signatures
from ldm_lab.utils.nested import find, targets


def check(config: dict[str, Any]) -> None:
    """Reject arguments of a wrong type, and numbers out of range, before anything is built.

    Args:
        config: resolved config as plain data. Its classes are imported, so call `checks.check_code` first.

    Raises:
        UserError: an argument does not fit; the message names the shortest key that sets it.
    """
    for place, target in targets(config):
        node = place.removesuffix("._target_")
        hints = signatures.hints(target)
        for name, value in (find(config, node) or {}).items():
            key = f"{node}.{name}"
            if name in hints and not isinstance(value, (dict, list)):
                signatures.require(_shortest(config, key), value, SETTINGS.get(key, hints[name]))


def _shortest(config: dict[str, Any], key: str) -> str:
    """The key that a user types: `data.flip` for `data.module.train_set.flip`, and `seed` for every seed."""
    name = key.rpartition(".")[2]
    short = name if name == "seed" else f"{key.split('.')[0]}.{name}"
    return short if repr(find(config, short, ...)) == repr(find(config, key)) else key

"""Whether the arguments of components are of the types, and in the limits, that their constructors declare."""

from __future__ import annotations

from typing import Any

from ldm_lab.runs.settings import SETTINGS
from ldm_lab.utils import signatures
from ldm_lab.utils.nested import find, targets


def check(config: dict[str, Any]) -> None:
    """Refuse arguments of another type than declared, and numbers out of range, before anything is built.

    Args:
        config: resolved, as plain data; its classes are imported, so they must be allowed (see `checks.check_code`).

    Raises:
        UserError: an argument does not fit; the message names the shortest key that it has.
    """
    for place, target in targets(config):
        node = place.removesuffix("._target_")
        hints = signatures.hints(target)
        for name, value in (find(config, node) or {}).items():
            key = f"{node}.{name}"
            if name in hints and not isinstance(value, (dict, list)):
                signatures.require(_shortest(config, key), value, SETTINGS.get(key, hints[name]))


def _shortest(config: dict[str, Any], key: str) -> str:
    """What a user types: `data.module.train_set.flip` takes its value from `data.flip`, every seed from `seed`."""
    name = key.rpartition(".")[2]
    short = name if name == "seed" else f"{key.split('.')[0]}.{name}"
    return short if repr(find(config, short, ...)) == repr(find(config, key)) else key

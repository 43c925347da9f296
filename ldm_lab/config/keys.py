"""Looks up the keys of composed configs, as plain data, and the stages that an override is for."""

from __future__ import annotations

from typing import Any

from ldm_lab.config.checks import check_trainer
from ldm_lab.config.files import ConfigError, near
from ldm_lab.utils.nested import find


def knows(config: dict[str, Any], key: str) -> bool:
    """Whether a config has a dotted key."""
    return find(config, key, ...) is not ...


def keys(config: dict[str, Any], prefix: str = "") -> list[str]:
    """All dotted keys of a config, including its inner nodes."""
    found = []
    for key, value in config.items():
        found.append(f"{prefix}{key}")
        found += keys(value, f"{prefix}{key}.") if isinstance(value, dict) else []
    return found


def where_known(config: dict[str, Any]) -> dict[str, Any]:
    """The values and nodes that config files (`debug=tiny`, `process=flow`) set only in stages that have their keys."""
    return {key: value for key, value in config.get("where_known", {}).items() if knows(config, key)}


def takers(line: str, key: str, adds: bool, configs: list[dict[str, Any]]) -> list[int]:
    """The positions of the stages that an override is for: the stages that have its key.

    If no stage has the key, `+key=value` is for the stages that have the key's parent node, else for all.

    Args:
        line: the override as typed.
        key: key of the override.
        adds: whether the override may add its key.
        configs: configs of the stages, before the override.

    Raises:
        ConfigError: no stage has the key; the message suggests similar keys.
    """
    everyone = list(range(len(configs)))
    if key.startswith("hydra."):
        return everyone
    if found := [place for place in everyone if knows(configs[place], key)]:
        return found
    if adds:
        parent = key.rpartition(".")[0]
        return [place for place in everyone if not parent or isinstance(find(configs[place], parent), dict)] or everyone
    if key.startswith("trainer."):
        check_trainer({**configs[0], "trainer": {key.removeprefix("trainer."): line.partition("=")[2]}})
    known = sorted({key for config in configs for key in keys(config)})
    where = "no stage has this key" if "stage" in configs[0] else "no such key"
    raise ConfigError(f"{line}: {where}; {near(key, known)}")

"""The keys of composed configs, as plain data: which there are, and which stage an override is for."""

from __future__ import annotations

from typing import Any

from ldm_lab.config.checks import check_trainer
from ldm_lab.config.files import ConfigError, near
from ldm_lab.utils.nested import find


def knows(config: dict[str, Any], key: str) -> bool:
    """Whether a config has a dotted key."""
    return find(config, key, ...) is not ...


def keys(config: dict[str, Any], prefix: str = "") -> list[str]:
    """All dotted keys of a config, also of its inner nodes."""
    found = []
    for key, value in config.items():
        found.append(f"{prefix}{key}")
        found += keys(value, f"{prefix}{key}.") if isinstance(value, dict) else []
    return found


def where_known(config: dict[str, Any]) -> dict[str, Any]:
    """The values that a config file (`debug=tiny`) has for keys that not every stage has."""
    return {key: value for key, value in config.get("where_known", {}).items() if knows(config, key)}


def takers(line: str, key: str, adds: bool, configs: list[dict[str, Any]]) -> list[int]:
    """Which of the stages an override is for, by place: those that have its key.

    If none has, one that adds a key (`+key=value`) is for those with a place for it, else for all.

    Args:
        line: the override as typed.
        key: that it sets.
        adds: whether it may add one.
        configs: of the stages, without the override.

    Raises:
        ConfigError: no stage has the key; the message says which are near.
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

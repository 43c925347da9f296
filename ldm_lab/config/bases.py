"""Composes configs from YAML files with Hydra, before the keys of a command are set; caches the results."""

from __future__ import annotations

import functools
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ldm_lab.config import files
from ldm_lab.config.files import ConfigError, read_yaml
from ldm_lab.utils.errors import one_line


def base(name: str, groups: tuple[str, ...] = ()) -> dict[str, Any]:
    """A composed config as plain data, before keys are set; missing values and interpolations stay text.

    Composing takes half a second, so the result is cached until a YAML file changes.

    Args:
        name: name of the primary file, `train` or `sample`.
        groups: overrides that choose config files.

    Raises:
        ConfigError: a file cannot be read, or a group has no such file.
    """
    return _base(name, groups, _versions())


@functools.lru_cache(maxsize=64)
def _base(name: str, groups: tuple[str, ...], versions: object) -> dict[str, Any]:
    return OmegaConf.to_container(composed(name, list(groups)), resolve=False)  # type: ignore[return-value]


def _versions() -> tuple[tuple[str, int, int], ...]:
    """Path, size and modification time of each YAML file, as a cache key."""
    found = [(path, path.lstat()) for path in sorted(files.CONFIGS.rglob("*.yaml"))]
    return tuple((str(path), stat.st_size, stat.st_mtime_ns) for path, stat in found)


def composed(name: str, overrides: list[str]) -> DictConfig:
    """Compose a config with Hydra. Raises `ConfigError`, see `base`."""
    try:
        if GlobalHydra.instance().is_initialized():  # inside a job of a sweep
            return compose(name, overrides)
        with initialize_config_dir(str(files.CONFIGS), version_base="1.3"):
            return compose(name, overrides)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError) as error:
        for path in sorted(files.CONFIGS.rglob("*.yaml")):
            read_yaml(path)  # its error names the file; Hydra's may not
        raise ConfigError(one_line(error)) from error


def settable(base: dict[str, Any]) -> DictConfig:
    """A base as a `DictConfig`, to which only `+key=` adds keys."""
    return OmegaConf.create(base, flags={"struct": True})

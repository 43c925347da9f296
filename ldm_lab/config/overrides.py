"""Parses overrides by Hydra's grammar, and applies them to composed configs."""

from __future__ import annotations

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from ldm_lab.config.files import ConfigError
from ldm_lab.utils import shell
from ldm_lab.utils.errors import one_line
from ldm_lab.utils.nested import shown


def parse_overrides(lines: list[str], several: bool = False) -> list[Override]:
    """Parse `key=value` strings by Hydra's grammar; paths and names count as literal text (see `shell.as_text`).

    Args:
        lines: overrides as typed.
        several: whether the overrides are of a sweep.

    Raises:
        ConfigError: a line does not have this form.
    """
    parser, parsed = OverridesParser.create(), []
    for line in lines:
        try:
            parsed.append(parser.parse_override(shell.as_text(line, several)))
        except HydraException as error:
            signs = "; a value with signs other than letters, digits and ./- needs inner quotes: \"key='a (b)'\""
            raise ConfigError(f"{line}: not of the form key=value{signs if '=' in line else ''}") from error
    return parsed


def one_job(overrides: list[Override]) -> list[Override]:
    """Return the overrides. Raises `ConfigError` if they describe several jobs."""
    for o in overrides:
        if o.is_sweep_override():
            key, _, values = o.input_line.partition("=")
            raise ConfigError(f"{o.input_line}: a list is {key}=[{values}]; a job for each value needs -m (--multirun)")
    return overrides


def apply(override: Override, config: DictConfig) -> None:
    """Set, add or remove one key of a composed config, in place, by the rules of Hydra.

    Hydra itself does this only while composing, which reads every file again and takes half a second.

    Raises:
        ConfigError: `+key=` for a key with a value, `~key` for a key without, or `~key=value` for another value.
    """
    line, key, value = override.input_line, override.key_or_group, override.value()
    if key.startswith("hydra."):  # Hydra's own settings affect only sweeps
        return
    try:
        old = OmegaConf.select(config, key, throw_on_missing=False)
        if override.package is not None:
            raise ConfigError(f"{line}: {key} is no group of config files")
        if override.is_delete():
            if old is None or value not in (None, old):
                raise ConfigError(f"{line}: {key} is {shown(old)}")
            parent, _, name = key.rpartition(".")
            with open_dict(config):
                del (OmegaConf.select(config, parent) if parent else config)[name]
        elif override.is_add() and old is not None and not isinstance(value, (dict, list)):
            raise ConfigError(f"{line}: {key} is there already; leave out the +")
        else:
            OmegaConf.update(config, key, value, merge=True, force_add=override.is_add() or override.is_force_add())
    except OmegaConfBaseException as error:
        raise ConfigError(f"{line}: {one_line(error)}") from error


def as_typed(override: Override) -> str:
    """An override without the quotes that `shell.as_text` has added for Hydra."""
    line = f"{override.get_key_element()}={override.value()}"
    return line if shell.as_text(line) == override.input_line else override.input_line


def first(override: Override) -> str:
    """An override with only the first of its swept values."""
    if not override.is_sweep_override():
        return override.input_line
    if override.is_interval_sweep():
        return f"{override.get_key_element()}={override.value().start}"
    return f"{override.get_key_element()}={next(override.sweep_string_iterator())}"

"""Reads `configs/` as plain YAML: its experiments, options and searches."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import yaml

from ldm_lab.config.sweep import search_lines
from ldm_lab.runs.stages import STAGES
from ldm_lab.utils.errors import UserError, one_line

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
OPTIONAL = ("debug", "length", "local", "process")  # groups that may be left out


class ConfigError(UserError):
    """The user typed something invalid; the one-line message says what to change."""


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping from a file; empty for an empty file. Raises `ConfigError` for anything else."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not readable as YAML: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must hold keys with values, but holds a {type(content).__name__}")
    return content


def experiments() -> list[str]:
    """The values that `experiment=` accepts."""
    root = CONFIGS / "experiment"
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml"))


def stages(experiment: str) -> tuple[str, ...]:
    """The stages of an experiment; without a list, the experiment itself. Raises `ConfigError` if it does not exist."""
    path = CONFIGS / "experiment" / f"{experiment}.yaml"
    if not path.is_file():
        raise ConfigError(f"experiment={experiment}: no such experiment; {near(experiment, experiments())}")
    return tuple(read_yaml(path).get("stages", [experiment]))


def local_plugins() -> Any:  # noqa: ANN401
    """The packages that `configs/local/default.yaml` names."""
    local = CONFIGS / "local/default.yaml"
    return (read_yaml(local).get("plugins") if local.is_file() else None) or []


def option_for(line: str, group: str, value: Any, stage: str) -> str | None:  # noqa: ANN401
    """An override that chooses a config file, in the form for one stage; `None` if it is for another stage.

    An option may be a folder with a file per stage (`debug=tiny`). An option of `model=` may belong to one stage.

    Args:
        line: the override as typed.
        group: folder in `configs/`.
        value: the option; a list goes to every stage.
        stage: "autoencoder", "diffusion" or "sample".

    Raises:
        ConfigError: there is no such option.
    """
    if isinstance(value, list) or (value is None and group in OPTIONAL):
        return line
    path = CONFIGS / group / str(value)
    if path.is_dir():
        return f"{group}={value}/{stage}"
    if value is None or not path.with_name(f"{path.name}.yaml").is_file():
        none = f"; {group}=none switches it off" if value is None and "none" in _options(group) else ""
        raise ConfigError(f"{line}: there is no such option; {near(str(value), _options(group))}{none}")
    return line if _is_of(group, path, stage) else None


def choices(group: str, stage: str) -> list[str]:
    """The options of a group that are valid for a stage."""
    return [name for name in _options(group) if _is_of(group, CONFIGS / group / name, stage)]


def _options(group: str) -> list[str]:
    return sorted(p.stem for p in (CONFIGS / group).iterdir() if p.suffix == ".yaml" or p.is_dir())


def _is_of(group: str, path: Path, stage: str) -> bool:
    if path.is_dir() or path.name in STAGES:  # callbacks=diffusion, model=small/diffusion
        return path.is_dir() or path.name == stage
    if group != "model" or stage not in STAGES:
        return True
    module = read_yaml(path.with_suffix(".yaml")).get("_target_")
    if module is None:
        file = path.with_suffix(".yaml")
        raise ConfigError(f"model={path.name}: {file} needs its own `_target_`, which says for which stage it is")
    return f".{stage}_module." in module


def searched(line: str) -> list[str]:
    """The overrides in the file that `hparams_search=NAME` chooses; any other line unchanged."""
    key, _, name = line.partition("=")
    if key != "hparams_search":
        return [line]
    path = CONFIGS / key / f"{name}.yaml"
    if not path.is_file():
        searches = sorted(file.stem for file in path.parent.glob("*.yaml"))
        raise ConfigError(f"{line}: there is no such search; {near(name, searches)}")
    return search_lines(read_yaml(path))


def near(word: str, words: list[str]) -> str:
    """A hint for a misspelt word: the closest of `words`, or all of them if they are few."""
    if len(words) <= 20:
        return f"there are: {', '.join(words)}"
    similar = difflib.get_close_matches(word, words, n=3, cutoff=0.5)
    same_ending = [w for w in words if w.rsplit(".", 1)[-1] == word.rsplit(".", 1)[-1]]
    hints = list(dict.fromkeys(same_ending[:3] + similar))
    return f"did you mean {' or '.join(hints)}?" if hints else "--cfg shows all keys"

"""What lies in `configs/`, read as plain YAML: which experiments, options and searches there are."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import yaml

from ldm_lab.config.sweep import search_lines
from ldm_lab.runs.stages import STAGES
from ldm_lab.utils.errors import UserError, one_line

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
OPTIONAL = ("debug", "length", "local")  # groups that may be left out


class ConfigError(UserError):
    """Something the user typed cannot be; the message is one line that says what to change."""


def read_yaml(path: Path) -> dict[str, Any]:
    """The keys of a file; none where it is empty. Raises `ConfigError` where it is no mapping in YAML."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not readable as YAML: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must hold keys with values, and holds a {type(content).__name__}")
    return content


def experiments() -> list[str]:
    """The names that `experiment=` takes."""
    root = CONFIGS / "experiment"
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml"))


def stages(experiment: str) -> tuple[str, ...]:
    """The stages of a recipe; an experiment that lists none is one itself. Raises `ConfigError` for no such file."""
    path = CONFIGS / "experiment" / f"{experiment}.yaml"
    if not path.is_file():
        raise ConfigError(f"experiment={experiment}: no such experiment; {near(experiment, experiments())}")
    return tuple(read_yaml(path).get("stages", [experiment]))


def local_plugins() -> Any:  # noqa: ANN401
    """The packages that `local/default.yaml` names."""
    local = CONFIGS / "local/default.yaml"
    return (read_yaml(local).get("plugins") if local.is_file() else None) or []


def option_for(line: str, group: str, value: Any, stage: str) -> str | None:  # noqa: ANN401
    """An override that picks a file, as one stage takes it; `None` where it is not meant for that stage.

    An option may be a folder with a file per stage (`debug=tiny`), or, for `model=`, belong to one stage.

    Args:
        line: the override as typed.
        group: the folder of `configs/`.
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
    """The options of a group that a stage may take."""
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
        raise ConfigError(f"model={path.name}: {file} needs a `_target_` of its own, which says whose stage it is")
    return f".{stage}_module." in module


def searched(line: str) -> list[str]:
    """`hparams_search=NAME` as the overrides that its file stands for; any other line as it is."""
    key, _, name = line.partition("=")
    if key != "hparams_search":
        return [line]
    path = CONFIGS / key / f"{name}.yaml"
    if not path.is_file():
        there = sorted(found.stem for found in path.parent.glob("*.yaml"))
        raise ConfigError(f"{line}: there is no such search; {near(name, there)}")
    return search_lines(read_yaml(path))


def near(word: str, words: list[str]) -> str:
    """A hint: the closest of `words`, or all of them where they are few."""
    if len(words) <= 20:
        return f"there are: {', '.join(words)}"
    close = difflib.get_close_matches(word, words, n=3, cutoff=0.5)
    ends = [w for w in words if w.rsplit(".", 1)[-1] == word.rsplit(".", 1)[-1]]
    found = list(dict.fromkeys(ends[:3] + close))
    return f"did you mean {' or '.join(found)}?" if found else "--cfg shows all keys"

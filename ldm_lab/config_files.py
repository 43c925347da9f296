"""What lies in `configs/`, read as plain YAML: which experiments, options and searches there are."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import yaml

from ldm_lab.errors import UserError, one_line
from ldm_lab.sweep import search_lines

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
STAGES = ("autoencoder", "diffusion")


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
        value: the option; anything but a name (`null`, a list) goes to every stage.
        stage: "autoencoder", "diffusion" or "sample".
    """
    if not isinstance(value, str):
        return line
    path = CONFIGS / group / value
    if path.is_dir():
        return f"{group}={value}/{stage}"
    if not path.with_suffix(".yaml").is_file():
        options = sorted(p.stem for p in (CONFIGS / group).iterdir() if p.suffix == ".yaml" or p.is_dir())
        raise ConfigError(f"{line}: there is no such option; {near(value, options)}")
    if value in STAGES and value != stage:  # callbacks=diffusion
        return None
    if group == "model" and stage in STAGES:
        module = read_yaml(path.with_suffix(".yaml")).get("_target_")
        if module is None:
            raise ConfigError(f"{line}: {path}.yaml needs a `_target_` of its own, which says whose stage it is")
        return line if f".{stage}_module." in module else None
    return line


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
    if len(words) <= 16:
        return f"there are: {', '.join(words)}"
    close = difflib.get_close_matches(word, words, n=3, cutoff=0.5)
    ends = [w for w in words if w.rsplit(".", 1)[-1] == word.rsplit(".", 1)[-1]]
    found = list(dict.fromkeys(ends[:3] + close))
    return f"did you mean {' or '.join(found)}?" if found else "--cfg shows all keys"

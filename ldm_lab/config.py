"""The one module, beside the two entries, that knows Hydra: from a command line to built objects.

A recipe (`experiment=celebahq`) lists stages (`celebahq/autoencoder`, `celebahq/diffusion`). It is
expanded here, before Hydra composes anything: each stage is an ordinary, flat config, and an override
goes to every stage that knows its key. A stage on its own is a recipe of one.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import hydra
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ldm_lab.sweep import job_name, pack, unpack

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
STAGES = ("autoencoder", "diffusion")

# Whole numbers, and the lowest that each may be.
LOWEST = {
    "max_images": 1, "validate_every": 1, "checkpoint_every": 1, "preview_every": 1, "seed": 0,
    "data.global_batch_size": 1, "data.batch_size": 1, "data.val_batch_size": 1, "data.num_workers": 0,
    "num_samples": 1, "batch_size": 1, "sampler.steps": 1,
}  # fmt: skip
INTERRUPTED = 130  # what shells expect of a command that Ctrl-C has ended


class ConfigError(ValueError):
    """Something the user typed cannot be; the message is one line that says what to change."""


@dataclass(frozen=True)
class Recipe:
    """What one command asks for: the stages in their order, and the overrides as they were typed."""

    experiment: str
    stages: tuple[str, ...]
    overrides: tuple[Override, ...]

    @classmethod
    def parse(cls, overrides: list[str], default: str = "avatars") -> Recipe:
        """Read `key=value` strings. Raises `ConfigError` for bad syntax or an unknown experiment."""
        parsed = parse_overrides(overrides)
        names = [o.value() for o in parsed if o.key_or_group == "experiment"]
        experiment = str(names[-1]) if names else default
        path = CONFIGS / "experiment" / f"{experiment}.yaml"
        if not path.is_file():
            raise ConfigError(f"experiment={experiment}: no such experiment; {_near(experiment, experiments())}")
        stages = yaml.safe_load(path.read_text(encoding="utf-8")).get("stages", [experiment])
        return cls(experiment, tuple(stages), tuple(o for o in parsed if o.key_or_group != "experiment"))

    def compose(self) -> list[DictConfig]:
        """One resolved config a stage. Raises `ConfigError` for a key that no stage knows, or a bad value."""
        bases = [_compose("train", [f"experiment={stage}", *self._groups(stage)]) for stage in self.stages]
        lines: list[list[str]] = [[] for _ in self.stages]
        for override in self.overrides:
            for stage in [] if is_group(override) else takers(override, bases):
                lines[stage].append(override.input_line or "")
        return [
            check(_compose("train", [f"experiment={stage}", *self._groups(stage), *mine]))
            for stage, mine in zip(self.stages, lines, strict=True)
        ]

    def command(self, stage: str) -> str:
        """What to type for one stage of this run."""
        experiment = self.stages[-1].rpartition("/")[0]
        where = [o.input_line for o in self.overrides if o.key_or_group in ("debug", "name", "data.root", "paths.runs")]
        return " ".join(["python train.py", f"experiment={experiment}/{stage}", *where])

    def _groups(self, stage: str) -> list[str]:
        """The overrides that pick a file (`trainer=ddp`), for one stage."""
        kind = stage.rsplit("/", 1)[-1]
        return [line for o in self.overrides if is_group(o) and (line := group_line(o, kind))]


def parse_overrides(lines: list[str]) -> list[Override]:
    """`key=value` strings, parsed by Hydra's grammar."""
    try:
        return OverridesParser.create().parse_overrides(lines)
    except HydraException as error:
        raise ConfigError(f"{' '.join(lines)}: not of the form key=value ({_line(error)})") from error


def experiments() -> list[str]:
    """The names that `experiment=` takes."""
    root = CONFIGS / "experiment"
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml"))


def is_group(override: Override) -> bool:
    """Whether an override picks a config file (`trainer=ddp`) rather than sets a value."""
    return (CONFIGS / override.key_or_group).is_dir()


def group_line(override: Override, stage: str) -> str | None:
    """A group override as one stage takes it; `None` where it is not meant for that stage.

    An option may be a folder with a file per stage (`debug=tiny`), or, for `model=`, belong to one stage.
    """
    group, value = override.key_or_group, override.value()
    if isinstance(value, str):
        folder = CONFIGS / group / value
        if folder.is_dir():
            return f"{group}={value}/{stage}"
        if not folder.with_suffix(".yaml").is_file():
            options = sorted(p.stem for p in (CONFIGS / group).iterdir() if p.suffix == ".yaml" or p.is_dir())
            raise ConfigError(f"{override.input_line}: there is no such option; {_near(value, options)}")
        if value in STAGES and value != stage:  # callbacks=diffusion
            return None
        if group == "model" and stage in STAGES:
            module = str(yaml.safe_load(folder.with_suffix(".yaml").read_text(encoding="utf-8")).get("_target_"))
            return override.input_line if f".{stage}_module." in module else None
    return override.input_line


def compose_sample(overrides: list[str]) -> DictConfig:
    """The config of `sample.py`."""
    parsed = parse_overrides(overrides)
    lines = [group_line(o, "sample") if is_group(o) else o.input_line for o in parsed]
    base = _compose("sample", [])
    for override in parsed:
        if not is_group(override) and not _knows(base, override):
            raise ConfigError(f"{override.input_line}: no such key; {_near(override.key_or_group, _keys(base))}")
    return check(_compose("sample", lines))


def _compose(name: str, overrides: list[str]) -> DictConfig:
    try:
        if GlobalHydra.instance().is_initialized():  # inside a job of a sweep
            return compose(name, overrides)
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            return compose(name, overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_line(error)) from error


def takers(override: Override, bases: list[DictConfig]) -> list[int]:
    """Which of the stages an override is for, by place: those that have its key.

    If none has, one that adds a key (`+key=value`) is for those with a place for it, else for all.
    """
    everyone = list(range(len(bases)))
    if override.key_or_group.startswith("hydra."):
        return everyone
    if found := [place for place in everyone if _knows(bases[place], override)]:
        return found
    if override.is_add() or override.is_force_add():
        parent = override.key_or_group.rpartition(".")[0]
        return [place for place in everyone if _node(bases[place], parent) is not None] or everyone
    known = sorted({key for base in bases for key in _keys(base)})
    raise ConfigError(f"{override.input_line}: no stage has this key; {_near(override.key_or_group, known)}")


def _knows(config: DictConfig, override: Override) -> bool:
    parent, _, last = override.key_or_group.rpartition(".")
    return last in list(_node(config, parent) or [])  # `in node` is false for keys without a value


def _node(config: DictConfig, key: str) -> DictConfig | None:
    """The part of a config at `key`, which must hold keys itself."""
    try:
        node = OmegaConf.select(config, key) if key else config
    except OmegaConfBaseException:
        return None
    return node if OmegaConf.is_dict(node) else None


def _keys(config: DictConfig, prefix: str = "") -> list[str]:
    keys = []
    for key in config:
        keys.append(f"{prefix}{key}")
        if not OmegaConf.is_missing(config, key) and not OmegaConf.is_interpolation(config, key):
            child = config[key]
            keys += _keys(child, f"{prefix}{key}.") if OmegaConf.is_dict(child) else []
    return keys


def check(config: DictConfig) -> DictConfig:
    """Resolve, and refuse values of the wrong kind before anything is built or read."""
    try:
        for key, low in LOWEST.items():
            value = OmegaConf.select(config, key)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < low):
                raise ConfigError(f"{key}={value}: must be a whole number, at least {low}")
        rate = OmegaConf.select(config, "model.optimizer.lr", default=1.0)
        if not isinstance(rate, (int, float)) or rate <= 0:
            raise ConfigError(f"model.optimizer.lr={rate}: must be a number above 0")
        OmegaConf.resolve(config)
    except OmegaConfBaseException as error:
        raise ConfigError(_line(error)) from error
    missing = sorted(OmegaConf.missing_keys(config))
    if missing or not config.get("name", "unnamed"):
        raise ConfigError(f"{(missing or ['name'])[0]}= must be given")
    return config


def build(node: DictConfig | None, where: str, **parts: Any) -> Any:  # noqa: ANN401
    """Make the object that a `_target_` node describes.

    Args:
        node: the node; `None` gives `None`.
        where: its key, for the message.
        parts: built objects, which take the place of the node's own entries.

    Raises:
        ConfigError: the constructor refused its arguments; the message is its own.
    """
    if node is None:
        return None
    own = {key: value for key, value in plain(node).items() if key not in parts}
    try:
        return instantiate({**own, "_partial_": True}, _convert_="all")(**parts)
    except Exception as error:  # whatever a constructor says of arguments that it cannot take
        cause = error.__cause__ if isinstance(error, InstantiationException) and error.__cause__ else error
        raise ConfigError(f"{where}: {_line(cause)}") from error


def build_all(nodes: DictConfig, where: str) -> list[Any]:
    """The objects of a group such as `callbacks`; one without a `_target_` sets values of one that is not there."""
    return [build(node, f"{where}.{name}") for name, node in nodes.items() if node and "_target_" in node]


def plain(config: DictConfig) -> dict[str, Any]:
    """A resolved config as dicts, lists, strings and numbers."""
    return OmegaConf.to_container(config, resolve=True)  # type: ignore[return-value]


def run(script: str, job: Callable[[list[str]], Any], usage: str) -> None:
    """What both entries do: flags, one job or a sweep of jobs, and errors of the user as one line.

    Args:
        script: "train" or "sample".
        job: takes the overrides of one job.
        usage: the text of `--help`.
    """
    flags = [a for a in sys.argv[1:] if a.startswith("-") and "=" not in a]
    overrides = [a for a in sys.argv[1:] if a not in flags and not ("--cfg" in flags and a == "job")]
    try:
        if {"-h", "--help"} & set(flags):
            print(usage)
        elif {"-m", "--multirun"} & set(flags):
            sweep(overrides, job)
        elif flags and flags != ["--cfg"]:
            raise ConfigError(f"{flags[0]}: unknown flag; there are --help, --cfg and -m (see {script}.py --help)")
        elif flags:
            configs = [compose_sample(overrides)] if script == "sample" else Recipe.parse(overrides).compose()
            print("---\n".join(yaml.safe_dump(plain(config), sort_keys=False) for config in configs), end="")
        else:
            job(overrides)
    except ValueError as error:
        fail(error)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(INTERRUPTED)


def fail(error: ValueError) -> NoReturn:
    """End with one line on stderr; `LDM_LAB_TRACEBACK=1` shows where it came from."""
    if os.environ.get("LDM_LAB_TRACEBACK"):
        raise error
    sys.exit(f"error: {_line(error)}")


def sweep(lines: list[str], job: Callable[[list[str]], Any]) -> None:
    """Run `job` once for each combination of the swept values in `lines`, each under a name of its own."""
    parsed = parse_overrides(lines)
    first = [next(_values(override)) for override in parsed]
    recipe = Recipe.parse(first)
    configs = recipe.compose()
    for config in configs:
        if "ddp" in str(config.trainer.get("strategy")) and config.trainer.devices != 1:
            raise ConfigError(
                f"-m with trainer.devices={config.trainer.devices}: the children of a sweep would replay the whole"
                " sweep; start one command per job, or use a launcher (hydra/launcher=submitit_slurm)"
            )
    swept = [override.key_or_group for override in parsed if override.is_sweep_override()]
    base = next((str(o.value()) for o in parsed if o.key_or_group == "name"), recipe.experiment.split("/")[0])
    given = any(override.key_or_group == "autoencoder" for override in parsed)
    # A stage 2 on its own has no first stage under the names of its jobs: all take the one of the run swept over.
    shared = [f"autoencoder='{configs[0].autoencoder}'"] if configs[0].autoencoder and not given else []

    @hydra.main(config_path=str(CONFIGS), config_name="sweep", version_base="1.3")
    def run_job(_: DictConfig) -> Any:  # noqa: ANN401
        mine = unpack(list(HydraConfig.get().overrides.task))
        unnamed = [line for line in mine if not line.startswith("name=")]
        try:
            return job([*unnamed, *shared, f"name='{job_name(base, swept, mine)}'"])
        except ValueError as error:  # Hydra would show a traceback
            fail(error)

    sys.argv = [sys.argv[0], "-m", f"paths.runs='{configs[0].paths.runs}'", *pack(lines)]
    run_job()


def _values(override: Override) -> Iterator[str]:
    """An override once for each of its swept values."""
    if not override.is_sweep_override():
        yield override.input_line or ""
        return
    for value in override.sweep_string_iterator():
        yield f"{override.get_key_element()}={value}"


def _near(word: str, words: list[str]) -> str:
    """A hint: the closest of `words`, or all of them where they are few."""
    if len(words) <= 16:
        return f"there are: {', '.join(words)}"
    close = difflib.get_close_matches(word, words, n=3, cutoff=0.5)
    ends = [w for w in words if w.rsplit(".", 1)[-1] == word.rsplit(".", 1)[-1]]
    found = list(dict.fromkeys(ends[:3] + close))
    return f"did you mean {' or '.join(found)}?" if found else "--cfg shows all keys"


def _line(error: BaseException) -> str:
    """An exception's message on one line."""
    return " ".join(str(error).split()) or type(error).__name__

"""Composes the configs of a command line, and runs it as one job or as a sweep of jobs.

A recipe (`experiment=celebahq`) lists stages (`celebahq/autoencoder`, `celebahq/diffusion`). This module expands
a recipe before Hydra composes anything: each stage is an ordinary, flat config, and an override goes to every stage
that has its key. A single stage is a recipe of one stage.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import hydra
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ldm_lab.config import channels, checks, files, jobs, kinds
from ldm_lab.config.bases import base, settable
from ldm_lab.config.build import build, build_all, plain  # noqa: F401  re-exported
from ldm_lab.config.files import (
    ConfigError,
    choices,
    local_plugins,
    option_for,
    searched,
    stages,
)
from ldm_lab.config.keys import takers, where_known
from ldm_lab.config.overrides import apply, as_typed, first, one_job, parse_overrides
from ldm_lab.config.sweep import job_name, pack, unpack
from ldm_lab.utils import nested, shell
from ldm_lab.utils.errors import one_line, reporting
from ldm_lab.utils.lengths import parse_images
from ldm_lab.utils.signals import listen
from ldm_lab.utils.terminal import lenient
from ldm_lab.utils.threads import wait_asleep
from ldm_lab.utils.urls import masked, without_secrets

# Keys with a number of images, which may be typed as 250k, 2M or 100ep, all but the first also as 25% of the first.
LENGTHS = ("max_images", "validate_every", "checkpoint_every", "preview_every", "snapshots")

FILES = ("data.root", "data.channels", "data.value_range")  # keys that both stages must have alike


def stem(path: str | None) -> str:
    """`${stem:PATH}` in a config: the last part of a path, `flowers` of `/data/flowers` or `/data/flowers.zip`.

    Characters that a shell would need quoted become `_`, as users type this name.
    """
    path = shell.path(masked(path or "folder")).absolute()
    name = path.name if path.is_dir() or not path.suffix else path.stem
    return re.sub(r"[^\w.+-]+", "_", name).strip("_") or "folder"


OmegaConf.register_new_resolver("stem", stem, replace=True)


@dataclass(frozen=True)
class Recipe:
    """The stages of a command in their order, and its overrides as typed."""

    experiment: str
    stages: tuple[str, ...]
    overrides: tuple[Override, ...]

    @classmethod
    def parse(cls, overrides: list[str], default: str = "avatars") -> Recipe:
        """Parse `key=value` strings. Raises `ConfigError` for bad syntax or an unknown experiment."""
        parsed = one_job(parse_overrides(overrides))
        if searches := [o for o in parsed if o.key_or_group == "hparams_search"]:
            raise ConfigError(f"{searches[0].input_line} is a sweep of many jobs: add -m")
        names = [o.input_line.partition("=")[2] for o in parsed if o.key_or_group == "experiment"]
        experiment = names[-1] if names else default
        return cls(experiment, stages(experiment), tuple(o for o in parsed if o.key_or_group != "experiment"))

    def compose(self, changes: Mapping[str, Mapping[str, Any]] = MappingProxyType({})) -> list[DictConfig]:
        """Compose one resolved config per stage. Raises `ConfigError` for an unknown key or a bad value.

        Args:
            changes: stage -> dotted key -> value that replaces a setting that the user has not typed.
        """
        for o in self.overrides:
            if is_group(o) and not any(option(o, _kind(stage)) for stage in self.stages):
                there = ", ".join(choices(o.key_or_group, _kind(self.stages[-1])))
                raise ConfigError(f"{o.input_line}: no such option for {' or '.join(self.stages)}; there are: {there}")
            if o.is_delete() and not is_group(o) and not o.key_or_group.startswith(("callbacks.", "logger.", "model.")):
                raise ConfigError(f"{o.input_line}: the key is needed; give it another value")
        bases = [base("train", (f"experiment={stage}", *self._groups(stage))) for stage in self.stages]
        configs = [_changed(settable(one), where_known(one)) for one in bases]
        _apply(self.overrides, [OmegaConf.to_container(one, resolve=False) for one in configs], configs)
        for config in configs:
            _changed(config, changes.get(config.stage, {}))
        plugins = plugins_given(self.overrides)
        checked = [check(config, plugins) for config in configs]
        return [_changed(config, channels.follow(plain(config), self.typed)) for config in checked]

    @property
    def typed(self) -> set[str]:
        """The keys that the user has set."""
        return {override.key_or_group for override in self.overrides if not is_group(override)}

    def command(self, stage: str) -> str:
        """The shell command that trains one stage of this run."""
        experiment = self.stages[-1].rpartition("/")[0]
        where = ("debug", "model", "plugins", "name", "data", *FILES, "paths.runs")
        mine = [o for o in self.overrides if o.key_or_group in where and (not is_group(o) or option(o, stage))]
        return shell.command("train.py", f"experiment={experiment}/{stage}", *map(masked, map(as_typed, mine)))

    def _groups(self, stage: str) -> list[str]:
        """The overrides that choose a config file (`trainer=ddp`), for one stage."""
        kind = _kind(stage)
        return [line for o in self.overrides if is_group(o) and (line := option(o, kind))]


def _kind(stage: str) -> str:
    return stage.rpartition("/")[2]


def is_group(override: Override) -> bool:
    """Whether an override chooses a config file (`trainer=ddp`) instead of setting a value."""
    return (files.CONFIGS / override.key_or_group).is_dir()


def option(override: Override, stage: str) -> str | None:
    """An override that chooses a config file, in the form for one stage (see `option_for`)."""
    return option_for(override.input_line, override.key_or_group, override.value(), stage)


def plugins_given(overrides: Iterable[Override]) -> Any:  # noqa: ANN401
    """The packages named on the command line, else in `configs/local/`; no other file may allow code."""
    typed = [override.value() for override in overrides if override.key_or_group == "plugins"]
    return typed[-1] if typed else local_plugins()


def compose_sample(overrides: list[str]) -> DictConfig:
    """Compose the config of `sample.py`."""
    parsed = one_job(parse_overrides(overrides))
    plain_base = base("sample", tuple(line for o in parsed if is_group(o) and (line := option(o, "sample"))))
    _apply(parsed, [plain_base], [config := settable(plain_base)])
    config.plugins = plugins_given(parsed)  # also those of local/, which this config does not include
    return check(config, config.plugins)


def _apply(overrides: Iterable[Override], bases: list[dict[str, Any]], configs: list[DictConfig]) -> None:
    """Set the keys of a command, in place, in the configs of the stages that have them."""
    for o in overrides:
        for stage in [] if is_group(o) else takers(o.input_line, o.key_or_group, o.is_add() or o.is_force_add(), bases):
            apply(o, configs[stage])


def _changed(config: DictConfig, values: Mapping[str, Any]) -> DictConfig:
    for key, value in values.items():
        OmegaConf.update(config, key, value, merge=False, force_add=True)
    return config


def check(config: DictConfig, plugins: Any) -> DictConfig:  # noqa: ANN401
    """Resolve a config, and reject invalid values before anything is built or read.

    Args:
        config: the composed config; changed in place.
        plugins: packages that the user has named.
    """
    try:
        raw = nested.flatten(OmegaConf.to_container(config, resolve=False))
        if missing := sorted(key for key, value in raw.items() if value == "???"):
            raise ConfigError(f"{missing[0]}= must be given")
        if config.plugins != plugins:
            raise ConfigError(
                f"plugins={config.plugins} stands in a config file: name it on the command line or in configs/local/"
            )
        resolved = plain(config)
        for check_early in (checks.check_code, checks.check_precision):
            check_early(resolved)  # before `_epoch`, which builds data sets
        _refuse_other_lengths(config)
        for key in LENGTHS:
            if isinstance(text := OmegaConf.select(config, key), str):
                epoch = _epoch(config) if text.strip().endswith("ep") else None
                stage = None if key == "max_images" else config.max_images
                OmegaConf.update(config, key, parse_images(text, key, epoch, stage))
        OmegaConf.resolve(config)
    except OmegaConfBaseException as error:
        raise ConfigError(one_line(error)) from error
    for key, value in nested.flatten(plain(config)).items():
        if isinstance(value, str) and shell.is_path(key):
            OmegaConf.update(config, key, shell.home(value))
    checks.check(plain(config))
    return config


def _epoch(config: DictConfig) -> int:
    """Training images in one epoch."""
    kinds.check({"data": plain(config.data)})
    return build(config.data.module, "data.module").num_train


def _refuse_other_lengths(config: DictConfig) -> None:
    """Reject lengths in epochs and steps; the error gives the equal number of images."""
    for unit in ("epochs", "steps"):
        value = config.trainer.get(f"max_{unit}")
        if "stage" in config and isinstance(value, int) and value > 0:
            size = _epoch(config) if unit == "epochs" else config.data.global_batch_size
            equal = f"{value} {unit} of {size:,} images are max_images={value * size}"
            raise ConfigError(f"trainer.max_{unit}={value}: the length of a stage is counted in images; {equal}")


def run(script: str, job: Callable[[list[str]], Any], usage: str) -> None:
    """Run a command: handle its flags, run one job or a sweep of jobs, and print user errors as one line.

    Args:
        script: "train" or "sample".
        job: function that runs one job, given its overrides.
        usage: text of `--help`.
    """
    wait_asleep()
    listen()
    with lenient(), reporting(f"running {script}.py"):
        flags, overrides = shell.parted(sys.argv[1:])
        if "--help" in flags:
            print(usage)
        elif flags == {"-m"} and script == "train":
            sweep(overrides, job)
        elif flags == {"--cfg"}:
            configs = [compose_sample(overrides)] if script == "sample" else Recipe.parse(overrides).compose()
            print(
                "---\n".join(yaml.safe_dump(without_secrets(plain(config)), sort_keys=False) for config in configs),
                end="",
            )
        elif flags:
            raise ConfigError(f"{' '.join(sorted(flags))}: not for {script}.py; see {script}.py --help")
        else:
            job(overrides)


def sweep(lines: list[str], job: Callable[[list[str]], Any]) -> None:
    """Run `job` once for each combination of the swept values in `lines`, each time under another run name."""
    lines = [shell.as_text(mine, several=True) for line in lines for mine in searched(line)]
    jobs.prepare(lines)
    ours = [line for line in lines if not line.startswith(("hydra.", "hydra/"))]
    parsed = parse_overrides(ours, several=True)
    recipe = Recipe.parse([first(override) for override in parsed])
    configs = recipe.compose()
    for config in configs:
        several = config.trainer.devices != 1 or config.trainer.num_nodes != 1  # `strategy=auto` then means ddp
        if several and not any("submitit" in line for line in lines):
            raise ConfigError(
                f"-m with trainer.devices={config.trainer.devices}: each process of a job would run the whole"
                " sweep again; start one command per job, or use a launcher (hydra/launcher=submitit_slurm)"
            )
    swept = [override.key_or_group for override in parsed if override.is_sweep_override()]
    given = any(override.key_or_group == "autoencoder" for override in parsed)
    # The jobs of a sweep of stage 2 alone train no first stage, so all jobs use the one of the base config.
    shared = [f"autoencoder={shell.quoted(configs[0].autoencoder)}"] if configs[0].autoencoder and not given else []

    folder = Path(configs[0].paths.runs, "multirun").absolute()

    @hydra.main(config_path=str(files.CONFIGS), config_name="sweep", version_base="1.3")
    def run_job(_: DictConfig) -> Any:  # noqa: ANN401
        mine = unpack(list(HydraConfig.get().overrides.task))
        unnamed = [line for line in mine if not line.startswith("name=")]
        with jobs.turn(folder), reporting(f"running {' '.join(mine)} of the sweep"):  # Hydra would show a traceback
            return job([*unnamed, *shared, f"name={shell.quoted(job_name(configs[0].name, swept, mine))}"])

    sys.argv = [sys.argv[0], "-m", f"paths.runs={shell.quoted(configs[0].paths.runs)}", *pack(lines)]
    try:
        run_job()
    except HydraException as error:
        raise ConfigError(one_line(error)) from error


def is_searched() -> bool:
    """Whether this process runs a job of a search, which compares the metrics of its jobs."""
    return HydraConfig.initialized() and not HydraConfig.get().sweeper._target_.endswith("BasicSweeper")

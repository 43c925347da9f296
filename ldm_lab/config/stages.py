"""Checks, plans and trains the stages of `train.py`, from their configs."""

from __future__ import annotations

import functools
import signal
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from ldm_lab.checkpoints import locate
from ldm_lab.checkpoints.checkpoint import fingerprint
from ldm_lab.config import channels, kinds
from ldm_lab.config.checks import check_code
from ldm_lab.config.compose import DictConfig, build, build_all, is_searched, plain
from ldm_lab.data.datamodule import ImageDataModule
from ldm_lab.models.first_stage import FirstStage
from ldm_lab.training import device, initial, launcher, mirror
from ldm_lab.training.planning import batch_size, preview
from ldm_lab.training.planning import plan as planning
from ldm_lab.training.planning.preflight import check_fit, check_order, check_samplers, require_same_channels
from ldm_lab.training.planning.trial import Trial
from ldm_lab.training.power_ema import PowerEMA
from ldm_lab.training.quiet import quiet
from ldm_lab.training.run import RunFolder, Schedule, Stopped, essentials, first_stage, fit
from ldm_lab.training.stage_module import StageModule
from ldm_lab.utils import cache_folder, locks, shell, signatures
from ldm_lab.utils.errors import UserError
from ldm_lab.utils.lengths import short
from ldm_lab.utils.limits import Positive
from ldm_lab.utils.nested import find
from ldm_lab.utils.signals import STOPPING
from ldm_lab.utils.terminal import is_first_process, say
from ldm_lab.utils.urls import without_secrets
from ldm_lab.utils.writing import require_writable

GUIDANCE = 1.5  # w of autoguidance that lowers the distance on every set that was tried: docs/guidance.md


def initial_settings(config: DictConfig, typed: Collection[str]) -> dict[str, Any]:
    """The settings that a config leaves to files: of the weights of `init=`, and `data.value_range=measure`."""
    return {**value_range(plain(config)), **initial.settings(plain(config), typed)}


def value_range(config: dict[str, Any]) -> dict[str, list[float]]:
    """`data.value_range` in numbers, if it is "measure"; else nothing.

    They are those of this run, else of its first stage, else the range of the images. The config that a run keeps has
    the numbers, so that a resumed run and later commands do not measure again.
    """
    if find(config, "data.value_range") != "measure":
        return {}
    folders = [config["paths"]["stage"], *Path(config["autoencoder"] or "").parents[:2]]
    for folder in folders:
        if isinstance(known := find(RunFolder(Path(folder)).started_with() or {}, "data.value_range"), list):
            return {"data.value_range": known}
    pixels = build(DictConfig(find(config, "data.module.train_set")), "data.module.train_set").pixels
    return {"data.value_range": list(pixels.value_range)}


def given_autoencoder(config: DictConfig, command: str) -> FirstStage | None:
    """Load the first stage for stage 2; `None` for stage 1. If it is missing, the error shows `command`."""
    if config.stage == "autoencoder":
        return None
    return first_stage(config.autoencoder, command, config.plugins)


def networks(config: DictConfig, autoencoder: FirstStage | None) -> dict[str, Any]:
    """Build the networks of a stage, and for stage 2 the scheduler and the objective.

    If the config leaves the UNet's channels open, the UNet has the channels of the latents of `autoencoder`.
    """
    model = config.model
    if config.stage == "autoencoder":
        return {"autoencoder": build(model.autoencoder, "model.autoencoder")}
    require_same_channels(config.autoencoder, autoencoder, channels.of_images(plain(config)))
    open_channels = [key for key in ("in_channels", "out_channels") if model.unet.get(key, 0) is None]
    unet = build(model.unet, "model.unet", **dict.fromkeys(open_channels, autoencoder.embed_dim))
    scheduler = build(model.scheduler, "model.scheduler")
    objective = build(model.objective, "model.objective", scheduler=scheduler)
    return {"autoencoder": autoencoder, "unet": unet, "scheduler": scheduler, "objective": objective}


def parts(
    config: DictConfig, autoencoder: FirstStage | None
) -> tuple[StageModule, ImageDataModule, Callable[..., Any]]:
    """Module, data, and factory of the `lightning.Trainer` for a stage."""
    data = build(config.data.module, "data.module")
    module = build(config.model, "model", **networks(config, autoencoder))
    precision = device.resolve_precision(config.trainer.precision, config.trainer.accelerator)
    return module, data, functools.partial(build, config.trainer, "trainer", precision=precision)


def schedule(config: dict[str, Any], plugins: Sequence[str]) -> Schedule | None:
    """The learning-rate schedule of a config from a run's folder; None if it can no longer be built.

    Args:
        config: the config as read; it may name only classes of this package and of plugins.
        plugins: packages that the user has named for this command.
    """
    node = find(config, "model.schedule") or {}
    try:
        check_code({"schedule": node, "plugins": list(plugins)})
        return build(DictConfig(node), "model.schedule")
    except UserError:
        return None


def preflight(configs: list[DictConfig], command: str, typed: Collection[str] = ()) -> None:
    """Check all stages before the first one trains, and print what each stage will train.

    Args:
        configs: configs of the stages.
        command: command that trains the autoencoder; the error shows it if the autoencoder is missing.
        typed: keys that the user has set.

    Raises:
        UserError: a stage cannot train.
    """
    for config in configs:
        kinds.check(plain(config))
        device.check(plain(config.trainer))
    if not configs[0].plan:
        mirror.restore([plain(config) for config in configs])
    folders = [RunFolder(Path(config.paths.stage)) for config in configs]
    if is_first_process() and not configs[0].plan:  # other ranks start after this one has begun to write
        for folder, config in zip(folders, configs, strict=True):
            for line in folder.check(plain(config), typed):
                say(line)
        check_order(folders, [config.max_images for config in configs])
        cached = find(plain(configs[-1]), "data.latents") == "cached"
        if len(configs) > 1 and cached and not folders[0].finished(configs[0].max_images, None):
            cache_folder.require_writable(configs[0].paths.cache)  # stage 2 will cache its latents there
    autoencoder = given_autoencoder(configs[0], command)
    for config in configs:
        if config.model.get("train") == "decoder" and not config.init:
            raise UserError("model.train=decoder: of which autoencoder? Name it with init=")
        with torch.device("meta"):  # no memory for weights
            made = networks(config, autoencoder)
        try_training(config.model)
        network = made["unet" if config.stage == "diffusion" else "autoencoder"]
        size = f"{type(network).__name__} with {network.num_parameters() / 1e6:,.1f} M parameters"
        say(f"  {config.stage}: {size}, {config.max_images:,} images in batches of {config.data.global_batch_size}")
        autoencoder = made["autoencoder"]
        check_fit(config.data.image_size, autoencoder, made.get("unet"))
        build_all(config.callbacks, "callbacks")  # so that bad settings fail before stage 1 trains
        if "scheduler" in made:
            check_samplers(plain(config).get("callbacks") or {}, made["scheduler"])


def try_training(model: DictConfig) -> None:
    """Build the optimizer, schedule and EMA of a dummy layer, so that bad settings fail before stage 1 trains."""
    weights = nn.Linear(1, 1)
    build(model.optimizer, "model.optimizer", params=weights.parameters())
    build(model.schedule, "model.schedule")
    build(model.get("ema"), "model.ema", network=weights)
    if model.get("power_ema") is not None:
        lengths = plain(model.power_ema)
        signatures.require("model.power_ema", lengths, Sequence[Positive])
        PowerEMA(weights, lengths)


def plan(configs: list[DictConfig], command: str) -> None:
    """Measure time, memory and disk space of the stages on one device, and show the images; writes no run.

    Raises:
        UserError: something does not fit; the message names the key to lower.
    """
    if not is_first_process():
        return
    quiet()
    runs, name, needed = configs[0].paths.runs, configs[0].name, 0
    require_writable(runs, "paths.runs=")
    preview.show_images(build(configs[0].data.module, "data.module"), Path(runs, f"plan_{name}.png"))
    autoencoder = given_autoencoder(configs[0], command)
    for config in configs:
        module, data, make_trainer = parts(config, autoencoder)
        trial = Trial(module, data, make_trainer, config.compile)
        if autoencoder is not None and config is configs[0]:
            sheet = Path(runs, f"plan_{name}_autoencoder.png")
            preview.show_reconstructions(autoencoder, data, trial.device, sheet)
        if data.batch_size == "auto":
            data.batch_size = batch_size.find(trial)
        needed += planning.show_stage(trial, config.max_images, config.snapshots)
        autoencoder = module.autoencoder
    planning.check_disk(needed, runs)


def train(config: DictConfig, command: str, typed: Collection[str]) -> dict[str, float]:
    """Build one stage and train it to its end; returns the metrics of its last validation.

    Args:
        config: the stage's config.
        command: command that trains the autoencoder; the error shows it if the autoencoder is missing.
        typed: keys that the user has set.
    """
    quiet()
    folder = RunFolder(Path(config.paths.stage))
    torch.manual_seed(config.seed)
    autoencoder = given_autoencoder(config, command)
    hashed = {"autoencoder_hash": autoencoder and fingerprint(autoencoder)}
    settings = without_secrets({**plain(config), **hashed})  # these are written and logged
    if status := folder.finished(config.max_images, settings["autoencoder_hash"]):
        if (copy := mirror.of(plain(config.paths), folder)) and is_first_process():
            copy.save()  # a start before may have failed to
        say(f"{folder.folder} is finished at {config.max_images:,} images: nothing to do")
        return status
    if is_first_process():
        require_writable(folder.folder, "paths.runs=")
    with locks.alone(folder.folder.parent, "another name=", is_first_process()):
        if stop := _train(config, settings, autoencoder, folder, typed):
            end_by(*stop)
    metrics = folder.status()
    shown = ", ".join(f"{key} {value:.4g}" for key, value in metrics.items() if "/" in key)
    say(f"{folder.folder} is finished{': ' if shown else ''}{shown}")
    return metrics


def _train(
    config: DictConfig,
    settings: dict[str, Any],
    autoencoder: FirstStage | None,
    folder: RunFolder,
    typed: Collection[str],
) -> Stopped | None:
    module, data, make_trainer = parts(config, autoencoder)
    if is_first_process():
        folder.check_marks(data.marks, config.resume)
    if config.init and not folder.last.is_file():
        initial.load(module, plain(config), typed)
    if data.batch_size == "auto":
        data.batch_size = batch_size.find(Trial(module, data, make_trainer, config.compile))
    loggers, callbacks = build_all(config.logger, "logger"), build_all(config.callbacks, "callbacks")
    trainer = make_trainer(**essentials(settings, callbacks, loggers))
    if copy := mirror.of(plain(config.paths), folder):
        trainer.strategy.checkpoint_io.written = copy.begin
    launcher.check_tasks(trainer.num_devices, trainer.num_nodes)
    say(f"{config.stage} on {device.describe(trainer)}")
    stop = fit(module, data, trainer, folder, settings, functools.partial(schedule, plugins=settings["plugins"]))
    if copy and is_first_process():
        copy.save()
    return stop


def sampling(config: DictConfig) -> str:
    """The command that draws samples of a finished run, guided by its first snapshot if it has one."""
    run = f"{config.paths.runs}/{config.name}"
    first = min(locate.snapshots(Path(config.paths.stage, locate.SNAPSHOTS)), default=config.max_images)
    guided = (f"guide={run}@{short(first)}", f"guidance={GUIDANCE}") if first < config.max_images else ()
    return shell.command("sample.py", f"ckpt={run}", *guided)


def end_by(status: int, line: str) -> NoReturn:
    """Exit with the status of a stop. Only rank 0 returns it, as launchers kill all ranks when one fails."""
    say(line)
    if is_first_process():
        sys.exit(status)
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)  # exit normally, whatever the launcher sends now
    sys.exit()


def optimized(metrics: dict[str, Any], name: str) -> float | None:
    """The metric that a search compares. Raises `UserError` if a search lacks this metric."""
    if name not in metrics and is_searched():
        known = ", ".join(key for key in metrics if "/" in key) or "no metrics: nothing was validated"
        raise UserError(f"optimized_metric={name}: the last stage has {known}")
    return metrics.get(name)

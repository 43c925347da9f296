"""Trains one stage from start to end."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lightning import Trainer

from ldm_lab.checkpoints import checkpoint
from ldm_lab.data.datamodule import ImageDataModule
from ldm_lab.data.loading import enough_shared_memory
from ldm_lab.models.autoencoders import load_autoencoder
from ldm_lab.models.first_stage import FirstStage
from ldm_lab.runs import card
from ldm_lab.runs.folder import RunFolder
from ldm_lab.runs.record import RunRecord, StageRecord
from ldm_lab.training.callbacks.checkpoint import Checkpoint
from ldm_lab.training.callbacks.encode import Encode
from ldm_lab.training.callbacks.export import Export
from ldm_lab.training.callbacks.interrupt import BrokenOff, Interrupt, without_own_handlers
from ldm_lab.training.callbacks.not_finite import NotFinite
from ldm_lab.training.callbacks.ranks import SameStart, SmallestBatchSize
from ldm_lab.training.callbacks.validate import NEVER, Validate
from ldm_lab.training.checkpoint_io import BackgroundCheckpointIO
from ldm_lab.training.facts import facts
from ldm_lab.training.loggers.run_logger import run_loggers
from ldm_lab.training.planning import memory
from ldm_lab.training.stage_module import StageModule
from ldm_lab.utils import hub
from ldm_lab.utils.nested import find
from ldm_lab.utils.reading import LoadError
from ldm_lab.utils.signals import status_of
from ldm_lab.utils.terminal import is_first_process, say

Schedule = Callable[[int], float]  # images seen -> multiplier of the learning rate

KEPT = ("val/", "codebook/")  # last metrics that status.json keeps
AGAIN = 75  # exit status EX_TEMPFAIL of sysexits.h: no failure, but training is not complete


class Stopped(NamedTuple):
    """Outcome of a training that stopped early.

    Attributes:
        status: exit status of the command.
        line: message for the user.
    """

    status: int
    line: str


def fit(
    module: StageModule,
    data: ImageDataModule,
    trainer: Trainer,
    run: RunFolder,
    config: dict[str, Any],
    schedule_of: Callable[[dict[str, Any]], Schedule | None],
) -> Stopped | None:
    """Train one stage to `max_images`, from its newest checkpoint if there is one.

    Args:
        module: the stage's module.
        data: the stage's images.
        trainer: the Lightning trainer.
        run: the stage's folder.
        config: the stage's config, as plain data.
        schedule_of: builds the learning-rate schedule of the config that the run was started with; returns None if
            the schedule cannot be built.

    Returns:
        How training was stopped, after everything was saved; None: training is complete.
    """
    without_own_handlers(trainer)
    data.compare_with_training = module.stage == "diffusion"
    set_lengths(trainer, data, config["max_images"])
    if config["compile"]:
        module.compile_networks()
    if start := run.newest(say):
        data.images_seen = checkpoint.describe(start)["images_seen"]
    if is_first_process():
        before = run.started_with()
        begin(run, module, data, trainer, config)
        if start:
            print(f"continuing {run.folder} at {data.images_seen:,} of {config['max_images']:,} images", flush=True)
            if before and before["max_images"] < config["max_images"]:
                line = lengthened(module, before, schedule_of(before), config["max_images"], data.images_seen)
                print(line, flush=True)
    train(module, data, trainer, config, start)
    interrupt = next(callback for callback in trainer.callbacks if isinstance(callback, Interrupt))
    finished = interrupt.agree(trainer) <= Interrupt.NO_SIGNAL and trainer.global_step >= trainer.max_steps
    if finished:
        finish(run, module, data, trainer, config)
    trainer.strategy.barrier()  # the next stage reads what rank 0 has just written
    return None if finished else stopped(interrupt, trainer, module)


def identity(module: StageModule, config: dict[str, Any]) -> dict[str, Any]:
    """The entries of status.json that identify a finished stage."""
    return {"stage": module.stage, "max_images": config["max_images"], "autoencoder": config["autoencoder_hash"]}


def begin(run: RunFolder, module: StageModule, data: ImageDataModule, trainer: Trainer, config: dict[str, Any]) -> None:
    """Write config, data marks and status into the folder, and log them. Only on the first process."""
    run.clear_leftovers()
    run.write_config(config)
    run.write_marks(data.marks)
    run.write_status(finished=False, **identity(module, config))
    for logger in trainer.loggers:
        logger.log_hyperparams(config)
    for logger in run_loggers(trainer):
        logger.forget_after(data.images_seen)
        logger.log_facts(lambda: facts(module, data))
        if config["autoencoder_hash"]:
            logger.use_artifact("autoencoder", config["autoencoder_hash"])


def train(
    module: StageModule, data: ImageDataModule, trainer: Trainer, config: dict[str, Any], start: Path | None
) -> None:
    """Train from the checkpoint `start`, or from the beginning, until the end or an interruption."""
    explained = memory.explained(module, data, trainer.world_size)
    with contextlib.suppress(BrokenOff), explained, enough_shared_memory():
        if start and owes_validation(data, config):
            trainer.validate(module, data, ckpt_path=start, weights_only=True, verbose=False)
        trainer.fit(module, data, ckpt_path=start, weights_only=True)


def finish(
    run: RunFolder, module: StageModule, data: ImageDataModule, trainer: Trainer, config: dict[str, Any]
) -> None:
    """Validate if the last validation is missing; write the model card, then mark the stage as finished."""
    if "val/loss" not in trainer.callback_metrics:  # an earlier start stopped after its last step
        trainer.validate(module, data, verbose=False)
    if is_first_process():
        metrics = {key: float(value) for key, value in trainer.callback_metrics.items() if "/" in key}
        kept = {key: value for key, value in sorted(metrics.items()) if key.startswith(KEPT) and "/loss_t" not in key}
        write_card(run, module.stage, kept)  # before the stage counts as finished
        run.write_status(finished=True, **identity(module, config), **kept)


def stopped(interrupt: Interrupt, trainer: Trainer, module: StageModule) -> Stopped:
    """Exit status and message: who stopped training, at how many images, and how to continue."""
    images = module.images_seen
    if interrupt.received is not None:
        line = f"stopped and saved at {images:,} images; the same command continues"
        return Stopped(status_of(interrupt.received), line)
    here = f"with experiment=.../{module.stage} and max_images={images} it finishes here"
    line = f"stopped at {images:,} images: {interrupt.reason(trainer)}; the same command continues, {here}"
    return Stopped(AGAIN, line)


def owes_validation(data: ImageDataModule, config: dict[str, Any]) -> bool:
    """Whether the step at which a run resumes had a validation, which may have been broken off."""
    seen, every = data.images_seen, config["validate_every"]
    return seen < config["max_images"] and seen // every > (seen - data.global_batch_size) // every


def lengthened(
    module: StageModule, before: dict[str, Any], schedule: Schedule | None, max_images: int, images_seen: int
) -> str:
    """One line on the effect of a larger `max_images` on the learning rate.

    Args:
        module: the stage's module with the current optimizer and schedule.
        before: config that the stage was started with.
        schedule: learning-rate schedule of that config; None if it cannot be built.
        max_images: current length of the stage.
        images_seen: images trained on so far.
    """
    rate = module.make_optimizer(module.parameter_groups()).param_groups[0]["lr"]
    goes_on, ends = (f"{rate * module.schedule(images):.2g}" for images in (images_seen, max_images))
    was = schedule and f"{(find(before, 'model.optimizer.lr') or rate) * schedule(images_seen):.2g}"
    known = f", {was} here before" if was else ""
    change = f" stays at {was}" if was == goes_on == ends else f"{known}, goes on at {goes_on} and ends at {ends}"
    return f"max_images {before['max_images']:,} -> {max_images:,}: the learning rate{change}"


def set_lengths(trainer: Trainer, data: ImageDataModule, max_images: int) -> None:
    """Convert lengths in images to Lightning's steps and batches. The last step may exceed `max_images`."""
    trainer.accumulate_grad_batches = data.accumulation(trainer.world_size)
    trainer.fit_loop.epoch_loop.max_steps = -(-max_images // data.global_batch_size)
    data.stop = trainer.max_steps * data.global_batch_size
    trainer.val_check_interval = NEVER  # `Validate` decides


def essentials(config: dict[str, Any], callbacks: list, loggers: list) -> dict[str, Any]:
    """Trainer arguments that every run needs: validation, checkpoints, a clean stop, the export."""
    stage = config["paths"]["stage"]
    validate = Validate(config["validate_every"])
    checkpoints = Checkpoint(f"{stage}/checkpoints", config["checkpoint_every"], validate)
    always = [SmallestBatchSize(), SameStart(), validate, checkpoints, Interrupt(), Export(stage)]
    # `NotFinite` comes first, before another callback logs, shows or saves the result of a step.
    callbacks = [NotFinite(stage), Encode(), *callbacks, *always]
    return {"callbacks": callbacks, "logger": loggers or False, "plugins": [BackgroundCheckpointIO()]}


def write_card(run: RunFolder, stage: str, metrics: dict[str, float]) -> None:
    """Write the model card beside the result; print an error in other files of the run and go on."""
    try:
        card.write(RunRecord(run.folder.parent, {stage: StageRecord(run.folder, stage)}), stage, metrics)
    except LoadError as error:
        say(f"no model card: {error}")


def first_stage(source: str | None, command: str, plugins: Sequence[str] = ()) -> FirstStage:
    """Load the autoencoder for stage 2. If it is missing, raises `LoadError` with the command that trains it."""
    if not source or not (Path(source).exists() or hub.is_name(source)):
        raise LoadError(f"autoencoder={source} is not there; make it with: {command}")
    return load_autoencoder(source, plugins)

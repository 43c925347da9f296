"""One stage from start to end."""

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
from ldm_lab.training.callbacks.same_start import SameStart
from ldm_lab.training.callbacks.smallest_batch_size import SmallestBatchSize
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

KEPT = ("val/", "codebook/")  # of the last metrics, in status.json
AGAIN = 75  # EX_TEMPFAIL of sysexits.h: nothing has failed, but the training is not at its end


class Stopped(NamedTuple):
    """A training that has ended before its end.

    Attributes:
        status: that the command ends with.
        line: what to say.
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
    """Train one stage to `max_images`, from its newest state if there is one.

    Args:
        module: the stage.
        data: its images.
        trainer: trains it.
        run: its folder.
        config: of the stage, as plain data.
        schedule_of: builds the schedule of the learning rate of another config, that the run was started with; None
            where it cannot be built.

    Returns:
        How it was stopped, after everything was saved; None: it came to its end.
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
    """What a finished stage is known by, in status.json."""
    return {"stage": module.stage, "max_images": config["max_images"], "autoencoder": config["autoencoder_hash"]}


def begin(run: RunFolder, module: StageModule, data: ImageDataModule, trainer: Trainer, config: dict[str, Any]) -> None:
    """Write into the folder what the stage is trained with, and tell the loggers. On the first process alone."""
    run.clear_leftovers()
    run.write_config(config)
    run.write_marks(data.marks)
    run.write_status(finished=False, **identity(module, config))
    for logger in trainer.loggers:
        logger.log_hyperparams(config)
    for logger in run_loggers(trainer):
        logger.forget_after(data.images_seen)
        logger.log_facts(facts(module, data))
        if config["autoencoder_hash"]:
            logger.use_artifact("autoencoder", config["autoencoder_hash"])


def train(
    module: StageModule, data: ImageDataModule, trainer: Trainer, config: dict[str, Any], start: Path | None
) -> None:
    """Train from the checkpoint `start`, or from the beginning, to the end or to where the user breaks off."""
    explained = memory.explained(module, data, trainer.world_size)
    with contextlib.suppress(BrokenOff), explained, enough_shared_memory():
        if start and owes_validation(data, config):
            trainer.validate(module, data, ckpt_path=start, weights_only=True, verbose=False)
        trainer.fit(module, data, ckpt_path=start, weights_only=True)


def finish(
    run: RunFolder, module: StageModule, data: ImageDataModule, trainer: Trainer, config: dict[str, Any]
) -> None:
    """Validate where the last validation is missing; write the model card, and that the stage is finished."""
    if "val/loss" not in trainer.callback_metrics:  # stopped between its last step and its end
        trainer.validate(module, data, verbose=False)
    if is_first_process():
        metrics = {key: float(value) for key, value in trainer.callback_metrics.items() if "/" in key}
        kept = {key: value for key, value in sorted(metrics.items()) if key.startswith(KEPT) and "/loss_t" not in key}
        write_card(run, module.stage, kept)  # before the stage counts as finished
        run.write_status(finished=True, **identity(module, config), **kept)


def stopped(interrupt: Interrupt, trainer: Trainer, module: StageModule) -> Stopped:
    """Who has stopped a training, where it stands, and how it goes on."""
    images = module.images_seen
    if interrupt.received is not None:
        line = f"stopped and saved at {images:,} images; the same command continues"
        return Stopped(status_of(interrupt.received), line)
    here = f"with experiment=.../{module.stage} and max_images={images} it finishes here"
    line = f"stopped at {images:,} images: {interrupt.reason(trainer)}; the same command continues, {here}"
    return Stopped(AGAIN, line)


def owes_validation(data: ImageDataModule, config: dict[str, Any]) -> bool:
    """Whether a validation belongs to the step at which a run resumes: it may not have come to its end."""
    seen, every = data.images_seen, config["validate_every"]
    return seen < config["max_images"] and seen // every > (seen - data.global_batch_size) // every


def lengthened(
    module: StageModule, before: dict[str, Any], schedule: Schedule | None, max_images: int, images_seen: int
) -> str:
    """What a larger `max_images` does to the learning rate, in one line.

    Args:
        module: with its optimizer and schedule of now.
        before: config that the stage was started with.
        schedule: of that config; None where it cannot be built.
        max_images: of now.
        images_seen: where the stage stands.
    """
    rate = module.make_optimizer(module.parameter_groups()).param_groups[0]["lr"]
    goes_on, ends = (f"{rate * module.schedule(images):.2g}" for images in (images_seen, max_images))
    was = schedule and f"{(find(before, 'model.optimizer.lr') or rate) * schedule(images_seen):.2g}"
    known = f", {was} here before" if was else ""
    change = f" stays at {was}" if was == goes_on == ends else f"{known}, goes on at {goes_on} and ends at {ends}"
    return f"max_images {before['max_images']:,} -> {max_images:,}: the learning rate{change}"


def set_lengths(trainer: Trainer, data: ImageDataModule, max_images: int) -> None:
    """Images -> the steps and batches that Lightning counts. The last step may run over `max_images`."""
    trainer.accumulate_grad_batches = data.accumulation(trainer.world_size)
    trainer.fit_loop.epoch_loop.max_steps = -(-max_images // data.global_batch_size)
    data.stop = trainer.max_steps * data.global_batch_size
    trainer.val_check_interval = NEVER  # `Validate` decides


def essentials(config: dict[str, Any], callbacks: list, loggers: list) -> dict[str, Any]:
    """Arguments of the trainer, with what no run can do without: validation, checkpoints, a clean stop, the export."""
    stage = config["paths"]["stage"]
    validate = Validate(config["validate_every"])
    checkpoints = Checkpoint(f"{stage}/checkpoints", config["checkpoint_every"], validate)
    always = [SmallestBatchSize(), SameStart(), validate, checkpoints, Interrupt(), Export(stage)]
    # `NotFinite` comes first: before others see, show or save what has come of a step.
    callbacks = [NotFinite(stage), Encode(), *callbacks, *always]
    return {"callbacks": callbacks, "logger": loggers or False, "plugins": [BackgroundCheckpointIO()]}


def write_card(run: RunFolder, stage: str, metrics: dict[str, float]) -> None:
    """Beside the result; what is wrong with other files of the run is said, and stops nothing."""
    try:
        card.write(RunRecord(run.folder.parent, {stage: StageRecord(run.folder, stage)}), stage, metrics)
    except LoadError as error:
        say(f"no model card: {error}")


def first_stage(source: str | None, command: str, plugins: Sequence[str] = ()) -> FirstStage:
    """The autoencoder of a stage 2. Raises `LoadError` with the command that makes one, where there is none."""
    if not source or not (Path(source).exists() or hub.is_name(source)):
        raise LoadError(f"autoencoder={source} is not there; make it with: {command}")
    return load_autoencoder(source, plugins)

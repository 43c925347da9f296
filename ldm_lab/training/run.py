"""One stage from start to end: the run folder, what is skipped, what is resumed, what is refused."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from lightning import Trainer

from ldm_lab import checkpoint
from ldm_lab.data.datamodule import ImageDataModule
from ldm_lab.models.vq_model import VQModel
from ldm_lab.serialization import LoadError, read_json, replacing, write_json
from ldm_lab.training.callbacks.checkpoint import Checkpoint
from ldm_lab.training.callbacks.export import Export
from ldm_lab.training.callbacks.interrupt import Interrupt
from ldm_lab.training.callbacks.validate import NEVER, Validate
from ldm_lab.training.checkpoint_io import AtomicCheckpointIO
from ldm_lab.training.stage_module import StageModule

# What may differ between two starts of one run, because it changes neither data, model nor objective: whole groups,
# and of the data where it lies and how it is read. A schedule follows `max_images`; the first stage has its own check.
HARMLESS_GROUPS = (
    "trainer", "callbacks", "logger", "paths", "resume", "compile", "max_images", "validate_every",
    "checkpoint_every", "preview_every", "autoencoder", "autoencoder_hash", "model.schedule",
)  # fmt: skip
HARMLESS_IN_DATA = ("root", "cache_dir", "num_workers", "batch_size", "val_batch_size")


def is_first_process() -> bool:
    """Whether this process may write; known before any process group exists."""
    return not any(int(os.environ.get(key) or 0) for key in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))


@dataclass(frozen=True)
class RunFolder:
    """`<runs>/<name>/<stage>/`: config.yaml, checkpoints/, metrics.csv, samples/, final/, status.json."""

    folder: Path

    @property
    def final(self) -> Path:
        """The result."""
        return self.folder / "final"

    @property
    def last(self) -> Path:
        """The newest state."""
        return self.folder / "checkpoints/last.ckpt"

    def status(self) -> dict[str, Any]:
        """What `status.json` says; nothing where there is none."""
        path = self.folder / checkpoint.STATUS
        return read_json(path) if path.is_file() else {}

    def write_status(self, **values: Any) -> None:  # noqa: ANN401
        """Write `status.json`."""
        write_json(self.folder / checkpoint.STATUS, values)

    def has_state(self) -> bool:
        """Whether anything was trained here; a start that failed before its first checkpoint binds nobody."""
        return self.last.is_file() or self.final.is_dir()

    def check(self, config: dict[str, Any]) -> None:
        """Compare the folder with the config of a stage that would go on in it; nothing is touched.

        `resume=auto` continues what is there, `never` wants an empty folder, `force` takes changed settings.

        Args:
            config: the stage's config, resolved, as plain data.

        Raises:
            ValueError: the folder holds something else.
        """
        resume, max_images = config["resume"], config["max_images"]
        if resume not in ("auto", "never", "force"):
            raise ValueError(f"resume={resume}: must be auto, never or force")
        if resume == "never" and self.folder.is_dir() and any(self.folder.iterdir()):
            raise ValueError(f"resume=never, but {self.folder} is not empty: choose another name=")
        path = self.folder / "config.yaml"
        if not (self.has_state() and path.is_file()):
            return
        old = yaml.safe_load(path.read_text(encoding="utf-8"))
        if max_images < old["max_images"]:
            raise ValueError(
                f"max_images={max_images}, but {self.folder} is made for {old['max_images']}:"
                " a run can be continued, not shortened; choose another name="
            )
        if resume == "auto" and (changed := differences(old, config)):
            raise ValueError(
                f"{self.folder} was started with other settings: {'; '.join(changed)}."
                " Choose another name=, or resume=force to go on with the new ones"
            )

    def finished(self, max_images: int, autoencoder: str | None) -> dict[str, Any] | None:
        """The status, if this stage is done at that length and with that first stage (its fingerprint).

        Raises:
            ValueError: it was trained on another first stage.
        """
        status = self.status()
        if self.has_state() and status.get("autoencoder", autoencoder) != autoencoder:
            raise ValueError(
                f"{self.folder} was trained on another autoencoder ({status['autoencoder']}, now {autoencoder}):"
                f" choose another name=, or go on with its own, autoencoder={self.last}"
            )
        done = status.get("finished") and status["max_images"] == max_images and self.final.is_dir()
        return status if done else None

    def write_config(self, config: dict[str, Any]) -> None:
        """Write `config.yaml`, making the folder where there is none."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(self.folder / "config.yaml") as temporary:
            temporary.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:  # noqa: ANN401
    """A nested dict as `{"a.b": value}`."""
    if not isinstance(tree, dict) or not tree:
        return {prefix[:-1]: tree}
    return {key: value for name, child in tree.items() for key, value in flatten(child, f"{prefix}{name}.").items()}


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The settings that matter and differ, as `key: old -> new`."""
    before, after = flatten(old), flatten(new)
    keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    keys = [key for key in keys if not is_harmless(key)]
    return [f"{key}: {before.get(key)} -> {after.get(key)}" for key in keys]


def is_harmless(key: str) -> bool:
    """Whether a changed setting leaves the run what it is."""
    if key == "trainer.gradient_clip_val":
        return False
    if key.startswith("data."):
        return key.rsplit(".", 1)[-1] in HARMLESS_IN_DATA
    return any(key == group or key.startswith(f"{group}.") for group in HARMLESS_GROUPS)


def fit(module: StageModule, data: ImageDataModule, trainer: Trainer, run: RunFolder, config: dict[str, Any]) -> bool:
    """Train one stage to `max_images`, from its newest state if there is one.

    Returns:
        Whether it came to its end and may be followed by another (`False`: it was interrupted; everything is saved).
    """
    data.compare_with_training = module.stage == "diffusion"
    set_lengths(trainer, data, config["max_images"])
    if config["compile"]:
        module.compile_networks()
    start = run.last if run.last.is_file() else None
    identity = {"stage": module.stage, "max_images": config["max_images"], "autoencoder": config["autoencoder_hash"]}
    if start:
        data.images_seen = checkpoint.describe(start)["images_seen"]
    if is_first_process():
        run.write_config(config)
        run.write_status(finished=False, **identity)
        for logger in trainer.loggers:
            if hasattr(logger, "forget_after"):
                logger.forget_after(data.images_seen)
            logger.log_hyperparams(config)
        if start:
            print(f"continuing {run.folder} at {data.images_seen:,} of {config['max_images']:,} images", flush=True)
    trainer.fit(module, data, ckpt_path=start, weights_only=True)
    finished = trainer.global_step >= trainer.max_steps
    if finished and "val/loss" not in trainer.callback_metrics:  # stopped between its last step and its end
        trainer.validate(module, data, verbose=False)
    if finished and is_first_process():
        metrics = {key: float(value) for key, value in trainer.callback_metrics.items() if "/" in key}
        kept = {key: value for key, value in sorted(metrics.items()) if key.startswith(("val/", "codebook/"))}
        run.write_status(finished=True, **identity, **kept)
    trainer.strategy.barrier()  # the next stage reads what rank 0 has just written
    return finished and not any(isinstance(c, Interrupt) and c.received for c in trainer.callbacks)


def set_lengths(trainer: Trainer, data: ImageDataModule, max_images: int) -> None:
    """Images -> the steps and batches that Lightning counts. The last step may run over `max_images`."""
    trainer.accumulate_grad_batches = data.accumulation(trainer.world_size)
    trainer.fit_loop.epoch_loop.max_steps = -(-max_images // data.global_batch_size)
    data.stop = trainer.max_steps * data.global_batch_size
    trainer.val_check_interval = NEVER  # `Validate` decides


def essentials(config: dict[str, Any], callbacks: list, loggers: list) -> dict[str, Any]:
    """Arguments of the trainer, with what no run can do without: validation, checkpoints, a clean stop, the export."""
    stage = config["paths"]["stage"]
    checkpoints = Checkpoint(f"{stage}/checkpoints", config["checkpoint_every"])
    always = [Validate(config["validate_every"]), checkpoints, Interrupt(), Export(stage)]
    return {"callbacks": [*callbacks, *always], "logger": loggers or False, "plugins": [AtomicCheckpointIO()]}


def first_stage(source: str | None, command: str) -> VQModel:
    """The autoencoder of a stage 2. Raises `LoadError` with the command that makes one, where there is none."""
    if not source or not Path(source).exists():
        raise LoadError(f"autoencoder={source} is not there; make it with: {command}")
    return checkpoint.load_autoencoder(source)

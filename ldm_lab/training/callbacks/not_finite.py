"""Handles NaN and infinity in losses and gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning import Callback
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer
from tqdm import tqdm

from ldm_lab.training.callbacks.every import Every
from ldm_lab.training.stage_module import StageModule
from ldm_lab.training.statistics import gathered
from ldm_lab.training.trainer import Trainer
from ldm_lab.utils.errors import UserError
from ldm_lab.utils.writing import write_json

ADVICE = (
    "Nothing of it is saved: the same command continues from the last checkpoint. Try trainer.precision=32-true;"
    " a lower model.optimizer.lr or trainer.gradient_clip_val=1, with resume=force; or leave such steps out,"
    " trainer.on_nan=skip"
)


@dataclass
class ScannedStep:
    """The images, losses and gradient norms of one optimizer step.

    Attributes:
        batches: `index` and `position` of the images of each micro-batch, on this rank.
        losses: loss of each micro-batch, 0-dim.
        names: the checked values.
        norms: gradient norm of each network before clipping; empty under float16.
        read: returns one flag for each of `names`, true if not finite; waits for the device.
        images_seen: training images at the end of the step.
    """

    batches: list[dict[str, Tensor]] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    norms: dict[str, Tensor] = field(default_factory=dict)
    read: Callable[[], list[bool]] = list
    images_seen: int = 0


class NotFinite(Callback):
    """Checks every step for NaN and infinity in losses and gradients, and never lets such a step be saved.

    `trainer.on_nan=stop` stops training on all ranks before the step is validated, shown or saved. `skip` skips the
    optimizer's step: weights, Adam moments, EMA weights, codebook and running statistics stay unchanged; the data
    stream, the learning rate and the step count go on; `train/skipped_steps` counts the skipped steps. Too many in a
    row stop training too. In both modes `folder/not_finite/<images seen>.json` lists the images of the step.

    The check costs a pass over the gradients, and with several ranks an all-reduce of a few numbers. `stop` reads the
    flag one step late, or as soon as another callback acts, so the step never waits for the device. `skip` must read
    the flag before the optimizer's step, so the device idles for a moment in each step. Under float16 the gradients are
    scaled, and the loss scaler skips steps itself: this callback checks only the loss.

    It also logs the gradient norm before clipping: `train/grad_norm`, and `disc/grad_norm` for a discriminator, which
    minimises its own loss.

    Args:
        folder: the stage's folder.
    """

    MOST_IN_A_ROW = 100

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder) / "not_finite"
        self.skipped = self.in_a_row = 0
        self._step = self._unread = ScannedStep()
        self._statistics: list[tuple[Tensor, Tensor]] = []

    def state_dict(self) -> dict[str, int]:
        """The counts of skipped steps."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restore the counts."""
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]

    def on_train_batch_start(self, trainer: Trainer, module: StageModule, batch: dict, batch_idx: int) -> None:
        """Record the images of a micro-batch."""
        if module.images_seen % trainer.datamodule.global_batch_size == 0:
            self._step = ScannedStep()
            if trainer.on_nan == "skip":  # the forward pass already changes running statistics
                normed = [part for part in module.modules() if hasattr(part, "running_mean")]
                self._statistics = [(b, b.clone()) for part in normed for b in part.buffers()]
        self._step.batches.append({key: batch[key] for key in ("index", "position")})

    def on_before_backward(self, trainer: Trainer, module: StageModule, loss: Tensor) -> None:
        """Record the loss of a micro-batch."""
        self._step.losses.append(loss.detach())

    def on_before_optimizer_step(self, trainer: Trainer, module: StageModule, optimizer: Optimizer) -> None:
        """Check the whole step before gradient clipping; with `skip`, drop gradients that are not finite."""
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        self._step.norms = {} if scaled else gradient_norms(module)
        norms = {f"gradient of {network}": norm for network, norm in self._step.norms.items()}
        looked_at = {"loss": torch.stack(self._step.losses), **norms}
        self._step.names = list(looked_at)
        flags = torch.stack([~value.isfinite().all() for value in looked_at.values()]).to(torch.uint8)
        if trainer.world_size > 1:
            torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
        self._step.read = read_later(flags)
        module.step_left_out = trainer.on_nan == "skip" and any(self._step.read())
        if module.step_left_out:
            for parameter in module.parameters():
                parameter.grad = None  # optimizers skip these parameters and their moments
            for statistic, before in self._statistics:
                statistic.copy_(before)

    def on_train_batch_end(
        self, trainer: Trainer, module: StageModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Report the step before; report this step too if another callback acts at its end."""
        if module.images_seen % trainer.datamodule.global_batch_size:
            return
        self._settle(trainer, module)
        self._step.images_seen, self._unread = module.images_seen, self._step
        intervals = [getattr(callback, "every", None) for callback in trainer.callbacks]  # any type in user callbacks
        others_act = any(every.crossed(module) for every in intervals if isinstance(every, Every))
        if trainer.on_nan == "skip" or others_act or trainer.global_step >= trainer.max_steps:
            self._settle(trainer, module)
        if trainer.on_nan == "skip":
            module.log("train/skipped_steps", float(self.skipped), batch_size=1)
        log_norms(module, self._step.norms)

    def on_save_checkpoint(self, trainer: Trainer, module: StageModule, checkpoint: dict[str, Any]) -> None:
        """Report before a checkpoint is saved, as after a signal."""
        self._settle(trainer, module)

    def _settle(self, trainer: Trainer, module: StageModule) -> None:
        """Update the counts, and report a step that was not finite."""
        step, self._unread = self._unread, ScannedStep()
        found = [name for name, flag in zip(step.names, step.read(), strict=True) if flag]
        if step.names:
            self.in_a_row = self.in_a_row + 1 if found else 0
            self.skipped += bool(found)
        if found:
            self._report(trainer, module, step, found)

    def _report(self, trainer: Trainer, module: StageModule, step: ScannedStep, found: list[str]) -> None:
        """Write the list of images; then stop training, or print that the step was skipped.

        Raises:
            UserError: training stops, on rank 0. The other ranks exit quietly, as a launcher ends all when one fails.
        """
        seen, size = step.images_seen, trainer.datamodule.global_batch_size
        path = self.folder / f"{seen:09d}.json"
        batches = gathered(trainer, images(trainer, step))
        line = (
            f"step {seen // size:,} of stage {module.stage}, images {seen - size:,} to {seen:,}: not finite:"
            f" {', '.join(found)}; its images are listed in {path}."
        )
        if trainer.is_global_zero:
            write_json(path, {"stage": module.stage, "images_seen": seen, "not_finite": found, "batches": batches})
        if trainer.on_nan == "stop" or self.in_a_row >= self.MOST_IN_A_ROW:
            row = f" The last {self.in_a_row} steps were like this." if self.in_a_row > 1 else ""
            raise UserError(f"{line}{row} {ADVICE}") if trainer.is_global_zero else SystemExit
        if trainer.is_global_zero and self.in_a_row == 1:
            tqdm.write(f"skipped {line}")


def images(trainer: Trainer, step: ScannedStep) -> list[dict[str, Any]]:
    """The micro-batches of this rank as JSON data, with file names if the data set has files."""
    path = getattr(trainer.datamodule.train_set, "path", None)
    batches = []
    for batch, loss in zip(step.batches, step.losses, strict=True):
        numbers = {key: values.tolist() for key, values in batch.items()}
        files = {"file": [str(path(index)) for index in numbers["index"]]} if path else {}
        batches.append({"rank": trainer.global_rank, "loss_finite": math.isfinite(loss), **numbers, **files})
    return batches


def gradient_norms(module: nn.Module) -> dict[str, Tensor]:
    """Gradient norm of each network, 0-dim; not finite if a value is not finite or its square overflows.

    Adam stores these squares. A norm is also several times as fast to compute as the largest absolute value.
    """
    networks: dict[str, list[Tensor]] = {}
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:
            network = name.removeprefix("loss.").split(".")[0]  # the discriminator is a submodule of the loss
            networks.setdefault(network, []).append(parameter.grad)
    return {name: get_total_norm(gradients) for name, gradients in networks.items()}


def log_norms(module: StageModule, norms: dict[str, Tensor]) -> None:
    """Log the norms without reading them from the device; the loggers read them when they write a row."""
    norms = dict(norms)
    if (discriminator := norms.pop("discriminator", None)) is not None:
        module.log("disc/grad_norm", discriminator, batch_size=1)
    if norms:
        module.log("train/grad_norm", torch.linalg.vector_norm(torch.stack(list(norms.values()))), batch_size=1)


def read_later(flags: Tensor) -> Callable[[], list[bool]]:
    """Copy flags to the host asynchronously; the returned function waits for the copy, not for later device work."""
    if flags.device.type != "cuda":
        return flags.bool().tolist
    copy, copied = flags.to("cpu", non_blocking=True), torch.cuda.Event()  # the copy is in pinned memory
    copied.record()

    def read() -> list[bool]:
        copied.synchronize()
        return copy.bool().tolist()

    return read

"""Losses and gradients that are not finite."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning import Callback
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer
from tqdm import tqdm

from ldm_lab.training.callbacks.every import Every
from ldm_lab.training.stage_module import StageModule
from ldm_lab.training.trainer import Trainer
from ldm_lab.utils.errors import UserError
from ldm_lab.utils.writing import write_json

ADVICE = (
    "Nothing of it is saved: the same command continues from the last checkpoint. Try trainer.precision=32-true;"
    " a lower model.optimizer.lr or trainer.gradient_clip_val=1, with resume=force; or leave such steps out,"
    " trainer.on_nan=skip"
)


@dataclass
class Looked:
    """What is known of a step.

    Attributes:
        batches: `index` and `position` of the images of its micro-batches, of this rank.
        losses: of them, 0-dim.
        names: of what was looked at.
        norms: of the gradients, by network, before they are clipped; none under float16.
        read: whether these are not finite; waits until it is known.
        images_seen: at its end.
    """

    batches: list[dict[str, Tensor]] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    norms: dict[str, Tensor] = field(default_factory=dict)
    read: Callable[[], list[bool]] = list
    images_seen: int = 0


class NotFinite(Callback):
    """Looks in every step whether losses and gradients are finite; what comes of others is never saved.

    `trainer.on_nan=stop` ends the training, on all ranks, before anything is validated, shown or saved of the step.
    With `skip` the optimizer's step is left out: weights, moments, averages, codebook and running statistics stay as
    they are, while the stream of images, the learning rate and the numbers of steps go on; `train/skipped_steps`
    counts. Too many in a row end the training too. Either way `folder/not_finite/<images seen>.json` lists the images.

    It costs a pass over the gradients, and with several ranks the reduction of a few numbers. `stop` learns the result
    at the end of the next step, when it is long there, or as soon as another callback acts; `skip` must know it before
    the optimizer's step, so that the device runs dry for a moment in each. Under float16 the gradients are those of its
    loss scaler, which leaves steps out itself: only the loss is looked at.

    The norm of the gradients is logged, as it is before clipping: `train/grad_norm`, and that of a discriminator, whose
    game is another, `disc/grad_norm`.

    Args:
        folder: the stage's folder.
    """

    MOST_IN_A_ROW = 100

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder) / "not_finite"
        self.skipped = self.in_a_row = 0
        self._step = self._unread = Looked()
        self._statistics: list[tuple[Tensor, Tensor]] = []

    def state_dict(self) -> dict[str, int]:
        """The counts."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Count on."""
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]

    def on_train_batch_start(self, trainer: Trainer, module: StageModule, batch: dict, batch_idx: int) -> None:
        """Remember which images these are."""
        if module.images_seen % trainer.datamodule.global_batch_size == 0:
            self._step = Looked()
            if trainer.on_nan == "skip":  # a forward changes these already
                normed = [part for part in module.modules() if isinstance(part, _NormBase)]
                self._statistics = [(b, b.clone()) for part in normed for b in part.buffers()]
        self._step.batches.append({key: batch[key] for key in ("index", "position")})

    def on_before_backward(self, trainer: Trainer, module: StageModule, loss: Tensor) -> None:
        """Remember the loss of a micro-batch."""
        self._step.losses.append(loss.detach())

    def on_before_optimizer_step(self, trainer: Trainer, module: StageModule, optimizer: Optimizer) -> None:
        """Look at the whole step, before its gradients are clipped; with `skip` take them away where need be."""
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
                parameter.grad = None  # which optimizers pass over, with their moments
            for statistic, before in self._statistics:
                statistic.copy_(before)

    def on_train_batch_end(
        self, trainer: Trainer, module: StageModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Say what was found: in the step before, and in this one where others act at its end."""
        if module.images_seen % trainer.datamodule.global_batch_size:
            return
        self._settle(trainer, module)
        self._step.images_seen, self._unread = module.images_seen, self._step
        intervals = [getattr(callback, "every", None) for callback in trainer.callbacks]  # a user's own may be anything
        others_act = any(every.crossed(module) for every in intervals if isinstance(every, Every))
        if trainer.on_nan == "skip" or others_act or trainer.global_step >= trainer.max_steps:
            self._settle(trainer, module)
        if trainer.on_nan == "skip":
            module.log("train/skipped_steps", float(self.skipped), batch_size=1)
        log_norms(module, self._step.norms)

    def on_save_checkpoint(self, trainer: Trainer, module: StageModule, checkpoint: dict[str, Any]) -> None:
        """Say it at the latest when something is saved, as after a signal."""
        self._settle(trainer, module)

    def _settle(self, trainer: Trainer, module: StageModule) -> None:
        """Count, and report what was not finite."""
        step, self._unread = self._unread, Looked()
        found = [name for name, flag in zip(step.names, step.read(), strict=True) if flag]
        if step.names:
            self.in_a_row = self.in_a_row + 1 if found else 0
            self.skipped += bool(found)
        if found:
            self._report(trainer, module, step, found)

    def _report(self, trainer: Trainer, module: StageModule, step: Looked, found: list[str]) -> None:
        """List the images; end the training, or say that the step was left out.

        Raises:
            UserError: the training ends here. Launchers end all processes when one fails: the others end quietly.
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


def images(trainer: Trainer, step: Looked) -> list[dict[str, Any]]:
    """The micro-batches of this rank, as plain data; with files where the data set has them."""
    path = getattr(trainer.datamodule.train_set, "path", None)
    batches = []
    for batch, loss in zip(step.batches, step.losses, strict=True):
        numbers = {key: values.tolist() for key, values in batch.items()}
        files = {"file": [str(path(index)) for index in numbers["index"]]} if path else {}
        batches.append({"rank": trainer.global_rank, "loss_finite": math.isfinite(loss), **numbers, **files})
    return batches


def gradient_norms(module: nn.Module) -> dict[str, Tensor]:
    """Network -> the norm of its gradient, 0-dim: not finite where a value is not, or too large to be squared.

    The squares are what Adam keeps. A norm is also several times as fast as the largest absolute value.
    """
    networks: dict[str, list[Tensor]] = {}
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:
            network = name.removeprefix("loss.").split(".")[0]  # the loss owns the discriminator
            networks.setdefault(network, []).append(parameter.grad)
    return {name: get_total_norm(gradients) for name, gradients in networks.items()}


def log_norms(module: StageModule, norms: dict[str, Tensor]) -> None:
    """Log them as they lie on the device: whoever writes a row of metrics reads them."""
    norms = dict(norms)
    if (discriminator := norms.pop("discriminator", None)) is not None:
        module.log("disc/grad_norm", discriminator, batch_size=1)
    if norms:
        module.log("train/grad_norm", torch.linalg.vector_norm(torch.stack(list(norms.values()))), batch_size=1)


def read_later(flags: Tensor) -> Callable[[], list[bool]]:
    """Copy to the host meanwhile: what is returned waits for this copy, not for what the device is given after it."""
    if flags.device.type != "cuda":
        return flags.bool().tolist
    copy, copied = flags.to("cpu", non_blocking=True), torch.cuda.Event()  # the copy lies in pinned memory
    copied.record()

    def read() -> list[bool]:
        copied.synchronize()
        return copy.bool().tolist()

    return read


def gathered(trainer: Trainer, mine: list[Any]) -> list[Any]:
    """The lists of all ranks in one, on each of them."""
    if trainer.world_size == 1:
        return mine
    lists: list[list[Any]] = [[] for _ in range(trainer.world_size)]
    torch.distributed.all_gather_object(lists, mine)
    return [item for items in lists for item in items]

"""A few steps of a stage, for what they tell: the memory they take and how fast they are. Nothing of them is kept."""

from __future__ import annotations

import copy
import gc
import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning import Callback, Trainer
from lightning.pytorch.plugins.environments import LightningEnvironment
from torch.utils.data import Dataset

from ldm_lab.data.datamodule import ImageDataModule
from ldm_lab.data.latents import DTYPES
from ldm_lab.training.latents import are_cached, moments_shape
from ldm_lab.training.planning import memory
from ldm_lab.training.planning.estimate import estimate
from ldm_lab.training.run import set_lengths
from ldm_lab.training.stage_module import StageModule
from ldm_lab.utils.errors import UserError

# A CPU's kernels work on copies in layouts of their own. Measured, of both stages: 1.2 to 1.5 times what tensors hold.
KERNELS = 1.5


@dataclass(frozen=True)
class Measured:
    """What a trial has found, on one device.

    Attributes:
        peak: bytes of memory, the most after the first step (see `memory.peak`).
        seconds: of each step of the optimizer but the first.
        images: of one step.
        checkpoint: bytes of a training checkpoint.
    """

    peak: int
    seconds: list[float]
    images: int
    checkpoint: int

    @property
    def rate(self) -> float:
        """Images per second: the median over the steps."""
        return self.images / statistics.median(self.seconds)


class Stopwatch(Callback):
    """Takes the time and the memory of the steps after the first, and stops when it has seen enough.

    Args:
        seconds: the time after which no other step is begun; two are always taken.
    """

    def __init__(self, seconds: float) -> None:
        self.limit = seconds
        self.measured: Measured | None = None
        self._ends: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, module: StageModule, *_: object) -> None:
        """Note when a step of the optimizer has ended."""
        if module.images_seen % trainer.datamodule.global_batch_size:
            return
        if module.device.type != "cpu":
            torch.accelerator.synchronize(module.device)  # the host runs ahead
        self._ends.append(time.perf_counter())
        if len(self._ends) == 1:  # kernels are chosen and compiled, the optimizer has its state
            memory.reset_peak(module.device)
        trainer.should_stop = len(self._ends) > 1 and self._ends[-1] - self._ends[0] > self.limit

    def on_train_end(self, trainer: Trainer, module: StageModule) -> None:
        """Read the result, while all is still on the device."""
        state = module.state_dict(), [optimizer.state_dict() for optimizer in trainer.optimizers]
        self.measured = Measured(
            peak=memory.peak(module.device),
            seconds=[end - start for start, end in itertools.pairwise(self._ends)],
            images=trainer.datamodule.global_batch_size,
            checkpoint=memory.num_bytes(state),
        )


class NoLatents(Dataset):
    """Zeros in the place of cached latents: a step on them costs what it will, before there are any."""

    def __init__(self, count: int, shape: Sequence[int], dtype: torch.dtype) -> None:
        self.count, self.moments = count, torch.zeros(shape, dtype=dtype)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        index, position = key
        return {"moments": self.moments, "index": index, "position": position}


class Trial:
    """Tries a stage on one device: the one that this process would train on, whoever else runs there.

    Args:
        module: the stage; trials run on copies, so that it stays as it is.
        data: its images.
        make_trainer: makes a `lightning.Trainer` with the stage's settings; takes arguments that replace them.
        compiled: whether networks are compiled.

    Attributes:
        trainer: one as training would have it, for what it knows: how many devices, which of them, what precision.
    """

    def __init__(
        self, module: StageModule, data: ImageDataModule, make_trainer: Callable[..., Trainer], compiled: bool = False
    ) -> None:
        self.module, self.data, self.make_trainer, self.compiled = module, data, make_trainer, compiled
        self.trainer = make_trainer(logger=False)
        data.accumulation(self.world_size)  # refuses a global batch that is not divisible

    @property
    def device(self) -> torch.device:
        """Where trials run."""
        return self.trainer.strategy.root_device

    @property
    def world_size(self) -> int:
        """Devices that training would use."""
        return self.trainer.world_size

    @property
    def share(self) -> int:
        """Images of a global batch that one device takes."""
        return self.data.global_batch_size // self.world_size

    @property
    def moments(self) -> tuple[int, int, int] | None:
        """`(M, h, w)` of what is cached for each image; None where the stage sees images."""
        cached = are_cached(self.module.stage, self.data)
        return moments_shape(self.module.autoencoder, self.data.image_size) if cached else None

    def portion(self, size: int) -> int:
        """What this process may have of `size` bytes: the memory of a CPU is shared by a machine's processes."""
        return size if self.device.type == "cuda" else size // self.trainer.num_devices

    def run(self, batch_size: int, images: int, steps: int, seconds: float = math.inf) -> Measured:
        """Train for a few steps, on real images, or on zeros where latents are cached.

        Args:
            batch_size: images that the device holds at a time.
            images: of one step of the optimizer, a multiple of `batch_size`.
            steps: of the optimizer, at most; two or more.
            seconds: the time after which no other step is begun.

        Raises:
            Exception: whatever is raised where memory does not suffice (see `memory.is_out_of_memory`).
        """
        module, data, stopwatch = copy.deepcopy(self.module), copy.copy(self.data), Stopwatch(seconds)
        data.batch_size, data.global_batch_size = batch_size, images
        if self.moments:
            data.cached = NoLatents(data.num_train, self.moments, DTYPES[data.latents_dtype])
        module.measures_scale = False  # of the latents: it takes its time, and no number here depends on it
        if self.compiled:
            module.compile_networks()
        with tempfile.TemporaryDirectory() as folder:
            trainer = self.make_trainer(
                **_one_device(self.device), callbacks=[stopwatch], default_root_dir=folder, limit_val_batches=0
            )
            set_lengths(trainer, data, steps * images)
            gc.collect()  # what earlier trials have left behind
            trainer.fit(module, data)
        return stopwatch.measured

    def needs(self, batch_size: int) -> float:
        """Bytes that training takes with so many images at a time: measured on a GPU, elsewhere estimated.

        Infinite where a GPU has not enough. On a CPU nothing is run: without the memory the system would end the
        process.
        """
        if self.device.type != "cuda":
            size = self.data.image_size
            held, work = estimate(self.module, size, batch_size, self.trainer.precision, self.moments)
            return held + KERNELS * work + self._reserve
        # Two micro-batches: from the second on gradients lie there while activations are made.
        images = batch_size * min(2, -(-self.share // batch_size))
        try:
            return self.run(batch_size, images, steps=2).peak + self._reserve
        except Exception as error:
            if not memory.is_out_of_memory(error):
                raise
        return math.inf

    @property
    def _reserve(self) -> int:
        """Bytes that a trial does not see: where there are several devices, the gradients on their way."""
        groups = self.module.parameter_groups() if self.world_size > 1 else []
        return memory.num_bytes([group["params"] for group in groups])

    def attempt(self, batch_size: int, **limits: Any) -> Measured:  # noqa: ANN401
        """`run` with the device's whole share of the global batch.

        Raises:
            UserError: that does not fit; the message names what to lower.
        """
        if self.device.type == "cuda" or self.needs(batch_size) <= self.portion(memory.free(self.device)):
            try:
                return self.run(batch_size, self.share, **limits)
            except Exception as error:
                if not memory.is_out_of_memory(error):
                    raise
        raise UserError(self.refusal(batch_size))

    def refusal(self, batch_size: int) -> str:
        """What to say where so many images at a time do not fit."""
        free = self.portion(memory.free(self.device))
        takes = f"training the {self.module.stage} stage takes more than the {memory.readable(free)} that are free"
        if batch_size > 1 and self.needs(1) <= free:
            return f"data.batch_size={batch_size}: {takes}: lower it, or let data.batch_size=auto find what fits"
        height, width = self.data.image_size
        return (
            f"data.image_size=[{height},{width}]: {takes}, even with one image at a time: lower it, or choose smaller"
            " networks with model="
        )


def _one_device(device: torch.device) -> dict[str, Any]:
    """Arguments of a trainer for this process alone, also where it is one of several."""
    return {
        "accelerator": "gpu" if device.type == "cuda" else device.type,
        "devices": 1 if device.index is None or device.type == "cpu" else [device.index],
        "num_nodes": 1,
        "strategy": "auto",
        "logger": False,
        "plugins": [LightningEnvironment()],
    }

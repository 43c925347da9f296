"""Trains a stage for a few steps to measure memory and speed; the trained weights are discarded."""

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
from ldm_lab.training.equivariance import Equivariance
from ldm_lab.training.latents import are_cached, moments_shape
from ldm_lab.training.planning import memory
from ldm_lab.training.planning.estimate import estimate
from ldm_lab.training.run import set_lengths
from ldm_lab.training.stage_module import StageModule
from ldm_lab.utils.errors import UserError

# CPU kernels copy tensors into other layouts. Measured for both stages: 1.2 to 1.5 times the bytes of the tensors.
KERNELS = 1.5


@dataclass(frozen=True)
class Measured:
    """Result of a trial on one device.

    Attributes:
        peak: peak bytes of memory after the first step (see `memory.peak`).
        seconds: duration of each optimizer step after the first.
        images: images per optimizer step.
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
    """Measures time and memory of the steps after the first, and stops training after a time limit.

    Args:
        seconds: no step starts after this time; there are always at least two steps.
    """

    def __init__(self, seconds: float) -> None:
        self.limit = seconds
        self.measured: Measured | None = None
        self._ends: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, module: StageModule, *_: object) -> None:
        """Record the time at the end of an optimizer step."""
        if module.images_seen % trainer.datamodule.global_batch_size:
            return
        if module.device.type != "cpu":
            torch.accelerator.synchronize(module.device)  # kernels run asynchronously
        self._ends.append(time.perf_counter())
        if len(self._ends) == 1:  # from now on kernels are selected and compiled, and the optimizer state exists
            memory.reset_peak(module.device)
        trainer.should_stop = len(self._ends) > 1 and self._ends[-1] - self._ends[0] > self.limit

    def on_train_end(self, trainer: Trainer, module: StageModule) -> None:
        """Read the result while the tensors are still on the device."""
        state = module.state_dict(), [optimizer.state_dict() for optimizer in trainer.optimizers]
        self.measured = Measured(
            peak=memory.peak(module.device),
            seconds=[end - start for start, end in itertools.pairwise(self._ends)],
            images=trainer.datamodule.global_batch_size,
            checkpoint=memory.num_bytes(state),
        )


class NoLatents(Dataset):
    """Zeros instead of cached latents: a step costs the same, and works before the cache exists."""

    def __init__(self, count: int, shape: Sequence[int], dtype: torch.dtype) -> None:
        self.count, self.moments = count, torch.zeros(shape, dtype=dtype)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        index, position = key
        return {"moments": self.moments, "index": index, "position": position}


class Trial:
    """Trial runs of a stage on the device that this process would train on.

    Args:
        module: the stage; trials run on copies, so it is not changed.
        data: the stage's images.
        make_trainer: makes a `lightning.Trainer` with the stage's settings; its arguments replace settings.
        compiled: whether to compile the networks.

    Attributes:
        trainer: a trainer as in training, to read the number of devices, this device and the precision.
    """

    def __init__(
        self, module: StageModule, data: ImageDataModule, make_trainer: Callable[..., Trainer], compiled: bool = False
    ) -> None:
        self.module, self.data, self.make_trainer, self.compiled = module, data, make_trainer, compiled
        self.trainer = make_trainer(logger=False)
        data.accumulation(self.world_size)  # raises if the global batch is not divisible

    @property
    def device(self) -> torch.device:
        """The device of trials."""
        return self.trainer.strategy.root_device

    @property
    def world_size(self) -> int:
        """Number of devices that training would use."""
        return self.trainer.world_size

    @property
    def share(self) -> int:
        """Images of a global batch per device."""
        return self.data.global_batch_size // self.world_size

    @property
    def moments(self) -> tuple[int, int, int] | None:
        """`(M, h, w)` of each image's cached moments; None if the stage trains on images."""
        cached = are_cached(self.module.stage, self.data)
        return moments_shape(self.module.autoencoder, self.data.image_size) if cached else None

    def portion(self, size: int) -> int:
        """This process's part of `size` bytes, as the processes of a machine share the CPU's memory."""
        return size if self.device.type == "cuda" else size // self.trainer.num_devices

    def run(self, batch_size: int, images: int, steps: int, seconds: float = math.inf) -> Measured:
        """Train for a few steps, on real images, or on zeros with `data.latents=cached`.

        Args:
            batch_size: images that the device holds at a time.
            images: images per optimizer step, a multiple of `batch_size`.
            steps: maximum number of optimizer steps; at least two.
            seconds: no step starts after this time.

        Raises:
            Exception: any out-of-memory error (see `memory.is_out_of_memory`).
        """
        module, data, stopwatch = copy.deepcopy(self.module), copy.copy(self.data), Stopwatch(seconds)
        data.batch_size, data.global_batch_size = batch_size, images
        if self.moments:
            data.cached = NoLatents(data.num_train, self.moments, DTYPES[data.latents_dtype])
        module.equivariance = Equivariance(0)  # transformed batches are smaller, and come later
        module.measures_scale = False  # measuring the latents' scale takes time and affects no result here
        if self.compiled:
            module.compile_networks()
        with tempfile.TemporaryDirectory() as folder:
            trainer = self.make_trainer(
                **_one_device(self.device), callbacks=[stopwatch], default_root_dir=folder, limit_val_batches=0
            )
            set_lengths(trainer, data, steps * images)
            gc.collect()  # frees the memory of earlier trials
            trainer.fit(module, data)
        return stopwatch.measured

    def needs(self, batch_size: int) -> float:
        """Bytes that training needs with this batch size: measured on a GPU, estimated elsewhere.

        Infinite if the GPU has too little. On a CPU nothing is run, as the system would kill a process that runs out
        of memory.
        """
        if self.device.type != "cuda":
            size = self.data.image_size
            held, work = estimate(self.module, size, batch_size, self.trainer.precision, self.moments)
            return held + KERNELS * work + self._reserve
        # Two micro-batches, as from the second on gradients and activations are in memory together.
        images = batch_size * min(2, -(-self.share // batch_size))
        try:
            return self.run(batch_size, images, steps=2).peak + self._reserve
        except Exception as error:
            if not memory.is_out_of_memory(error):
                raise
        return math.inf

    @property
    def _reserve(self) -> int:
        """Bytes that a trial on one device does not measure: with several devices, DDP's gradient buckets."""
        groups = self.module.parameter_groups() if self.world_size > 1 else []
        return memory.num_bytes([group["params"] for group in groups])

    def attempt(self, batch_size: int, **limits: Any) -> Measured:  # noqa: ANN401
        """`run` with the device's full share of the global batch.

        Raises:
            UserError: the share does not fit into memory; the message names the setting to lower.
        """
        if self.device.type == "cuda" or self.needs(batch_size) <= self.portion(memory.free(self.device)):
            try:
                return self.run(batch_size, self.share, **limits)
            except Exception as error:
                if not memory.is_out_of_memory(error):
                    raise
        raise UserError(self.refusal(batch_size))

    def refusal(self, batch_size: int) -> str:
        """The error message for a batch size that does not fit."""
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
    """Trainer arguments for this process alone, even if it is one of several ranks."""
    return {
        "accelerator": "gpu" if device.type == "cuda" else device.type,
        "devices": 1 if device.index is None or device.type == "cpu" else [device.index],
        "num_nodes": 1,
        "strategy": "auto",
        "logger": False,
        "plugins": [LightningEnvironment()],
    }

"""Estimates the memory of a training step by running it on fake tensors, which have a size and no content."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode  # none of these three modules has a public twin
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ldm_lab.training.equivariance import Equivariance
from ldm_lab.training.stage_module import StageModule
from ldm_lab.utils.pixels import PixelFormat


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of live tensors; a storage counts once, however many tensors share it.

    Attributes:
        now: bytes of the live tensors that were made or seen inside this mode.
        peak: maximum of `now`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable, types: Sequence[type], args: tuple = (), kwargs: dict | None = None
    ) -> object:
        """Run one operation and count its results."""
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1  # for an operation that needs a value (a timestep, the optimizer's step count): 1 is always valid
        output = func(*args, **(kwargs or {}))
        for value in tree_leaves(output):
            if isinstance(value, Tensor):
                self.see(value)
        return output

    def see(self, tensor: Tensor) -> None:
        """Count the storage of `tensor` until it is freed."""
        storage = tensor.untyped_storage()
        if id(storage) not in self._seen:  # torch gives the same object while a tensor holds the storage
            self._seen.add(id(storage))
            self._add(storage.nbytes())
            weakref.finalize(storage, self._forget, id(storage), storage.nbytes())

    def _add(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


class Estimate(NamedTuple):
    """Bytes that training needs.

    Attributes:
        held: kept between steps: weights, EMA weights, gradients, optimizer state.
        work: peak of a step on top of `held`. Workspaces inside of kernels are not counted.
    """

    held: int
    work: int


def estimate(
    module: StageModule,
    image_size: tuple[int, int],
    batch_size: int,
    precision: str = "32-true",
    moments: Sequence[int] | None = None,
) -> Estimate:
    """The bytes that tensors take while a stage trains on a CPU.

    It runs two steps, as the first step makes the optimizer state.

    Args:
        module: a stage; it is not changed.
        image_size: (height, width) in pixels.
        batch_size: images that the device holds at a time.
        precision: of `lightning.Trainer`.
        moments: `(M, h, w)` of each image's cached moments; None: the stage trains on images.
    """
    trainer = NoTrainer(batch_size, image_size, module.autoencoder.pixels)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    stage = _without_content(module, mode)
    stage.trainer = trainer  # the stage keeps only a weak reference
    stage.equivariance = Equivariance(0)  # transformed batches are smaller
    stage.log = stage.log_dict = lambda *_, **__: None
    stage.setup("fit")
    seen = torch.zeros(()).expand(batch_size, *(moments or (module.autoencoder.config.in_channels, *image_size)))
    batch = {"moments" if moments else "image": seen, "position": torch.arange(batch_size)}
    batch = stage.on_before_batch_transfer(batch, 0)
    with mode, LiveBytes() as live:
        for tensor in [*stage.parameters(), *stage.buffers()]:
            live.see(tensor)
        batch = tree_map_only(Tensor, torch.empty_like, batch)
        optimizer = stage.make_optimizer(stage.parameter_groups())
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision.endswith("mixed")):
                loss = stage.training_step(batch, 0)
            loss.backward()
            optimizer.step()
            del loss  # frees the graph; the gradients stay, as in gradient accumulation
    return Estimate(live.now, live.peak - live.now)


class NoTrainer(SimpleNamespace):
    """The trainer attributes that a training step reads."""

    def __init__(self, batch_size: int, image_size: tuple[int, int], pixels: PixelFormat) -> None:
        data = SimpleNamespace(global_batch_size=batch_size, image_size=image_size, pixels=pixels)
        super().__init__(world_size=1, training=True, accumulate_grad_batches=1, datamodule=data)


def _without_content(module: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """A copy of `module` with fake tensors."""
    tensors = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(tensor): mode.from_tensor(tensor) for tensor in tensors})

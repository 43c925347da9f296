"""Distributed computation of a row `(K,)` per image, with results independent of the number of devices."""

from __future__ import annotations

from collections.abc import Callable

import torch
from lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset, default_convert

from ldm_lab.data.loading import Collate, Loader, enough_shared_memory
from ldm_lab.metrics.extractors import CHUNK, exactly
from ldm_lab.metrics.images import Pixels

Compute = Callable[[Tensor], Tensor]  # images (B, C, H, W) of `Pixels` -> (B, K)


class Chunks(Dataset):
    """`chunks[c]`: the indices `(n,)` of `CHUNK` images, and the images `(n, C, H, W)`; the last may be smaller."""

    def __init__(self, images: Pixels) -> None:
        self.images = images

    def __len__(self) -> int:
        return -(-len(self.images) // CHUNK)

    def __getitem__(self, chunk: int) -> tuple[Tensor, Tensor]:
        places = range(chunk * CHUNK, min(len(self.images), (chunk + 1) * CHUNK))
        return torch.tensor(places), torch.stack([self.images[place] for place in places])


class Rows(LightningModule):
    """Computes the rows of this device's chunks.

    Chunks are the same for any number of devices, so the rows of a chunk do not depend on that number.

    Args:
        networks: networks that `compute` uses; Lightning moves them to the device.
        images: all images.
        compute: computes the rows of a chunk.
        width: K.
        num_workers: loader processes.
    """

    def __init__(self, networks: nn.Module, images: Pixels, compute: Compute, width: int, num_workers: int = 0) -> None:
        super().__init__()
        self.allow_zero_length_dataloader_with_multiple_devices = True  # fewer chunks than devices
        self.networks, self.images, self.compute, self.num_workers = networks, images, compute, num_workers
        self.found = torch.zeros(len(images), width)  # float32, on the CPU; zero for rows of other devices

    def predict_dataloader(self) -> Loader:
        """The chunks of this device."""
        chunks = Chunks(self.images)
        numbers = range(self.trainer.global_rank, len(chunks), self.trainer.world_size)
        collate = Collate(default_convert)  # a chunk is already a batch
        return Loader(Subset(chunks, numbers), batch_size=None, num_workers=self.num_workers, collate_fn=collate)

    def predict_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        """Compute the rows of one chunk."""
        places, images = batch
        with exactly(images.device):
            self.found[places.cpu()] = self.compute(images).float().cpu()


def rows(
    trainer: Trainer, networks: nn.Module, images: Pixels, compute: Compute, width: int, num_workers: int = 0
) -> Tensor:
    """The rows of all images, in order: `(N, K)`, float32, on the CPU of every rank."""
    module = Rows(networks, images, compute, width, num_workers)
    with enough_shared_memory():
        trainer.predict(module, return_predictions=False)
    return trainer.strategy.reduce(module.found.to(trainer.strategy.root_device), reduce_op="sum").cpu()

"""Lightning data module: training images as an endless stream, held-out images in equal shares per rank."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import lightning
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ldm_lab.data.dataset import ImageDataset, spread
from ldm_lab.data.latents import CachedLatents
from ldm_lab.data.loading import Collate, Loader, leave_signals_to_parent
from ldm_lab.data.sampler import StreamBatchSampler, accumulation
from ldm_lab.utils.errors import UserError
from ldm_lab.utils.images import require_shown
from ldm_lab.utils.limits import Count, Harmless, Whole
from ldm_lab.utils.pixels import RGB_8_BIT, PixelFormat


class ImageDataModule(lightning.LightningDataModule):
    """Loaders for a training and a held-out data set.

    The sampler already splits the stream over devices: run the trainer with
    `use_distributed_sampler=False` and `accumulate_grad_batches=datamodule.accumulation(world_size)`.
    The training loader has no length.

    Args:
        train_set: images to train on.
        val_set: held-out images.
        global_batch_size: images per optimizer step, over all devices.
        batch_size: images that one device holds at a time; None: its whole share of the global batch. "auto" counts
            as None until the planning code finds and sets a number (see `ldm_lab.training.planning.batch_size`).
        val_batch_size: held-out images that one device holds at a time; None: as in training.
        num_workers: loader processes per device; 0 loads in the training process.
        seed: seed of the order of training images.
        order: "uniform": any image may follow any other; "shards": archive after archive (see `sampler.shard_order`).
        shard_window: archives that "shards" mixes at a time.
        latents: stage 2 encodes each training image once ("cached") or in every step ("online").
        latents_dtype: dtype of cached latents, see `ldm_lab.data.latents.DTYPES`.
        latents_precision: precision of encoding for the cache, "float32" or "bfloat16".
        cache_dir: parent folder of the caches.
        preview_channels: channels that pictures of a run show, one or three; None: the first three, or the first.

    Attributes:
        images_seen: position in the stream at which training begins. To resume a run, set it before `Trainer.fit`.
        stop: position at which the training loader ends; None: never.
        compare_with_training: whether validation also runs over training images.
        cached: cached latents to train on; None: train on images.
    """

    def __init__(
        self,
        train_set: ImageDataset,
        val_set: ImageDataset,
        global_batch_size: Count,
        batch_size: Annotated[Count | Literal["auto"] | None, Harmless] = None,
        val_batch_size: Annotated[Count | None, Harmless] = None,
        num_workers: Annotated[Whole, Harmless] = 0,
        seed: Whole = 0,
        latents: Annotated[Literal["cached", "online"], Harmless] = "online",
        latents_dtype: Annotated[Literal["float16", "bfloat16", "float32"], Harmless] = "float16",
        latents_precision: Annotated[Literal["float32", "bfloat16"], Harmless] = "float32",
        cache_dir: str | Path = ".",
        preview_channels: Annotated[Sequence[int] | None, Harmless] = None,
        order: Literal["uniform", "shards"] = "uniform",
        shard_window: Count = 8,
    ) -> None:
        super().__init__()
        if train_set.image_size != val_set.image_size:
            raise UserError(f"images of {train_set.image_size} for training but {val_set.image_size} held out")
        self.train_set = train_set
        self.val_set = val_set
        self.global_batch_size = global_batch_size
        self.batch_size = batch_size
        self.val_batch_size = val_batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.order, self.shard_window = order, shard_window
        train_set.by_shards = order == "shards"
        self.images_seen = 0
        self.stop: int | None = None
        self.compare_with_training = False
        self.latents, self.latents_dtype, self.latents_precision = latents, latents_dtype, latents_precision
        self.cache_dir, self.preview_channels = cache_dir, preview_channels
        self.cached: CachedLatents | None = None

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the images."""
        return self.train_set.image_size

    @property
    def pixels(self) -> PixelFormat:
        """Channels and range of the images. Raises `UserError` unless both data sets have the same."""
        train, val = self.train_set.pixels, self.val_set.pixels
        if train != val:
            raise UserError(f"images of {train} for training but of {val} held out")
        return train

    @property
    def num_train(self) -> int:
        """Number of training images."""
        return len(self.train_set)

    @property
    def num_val(self) -> int:
        """Number of held-out images."""
        return len(self.val_set)

    def fingerprint(self) -> dict[str, str]:
        """A short text for each data set that changes with its images."""
        return {"train": self.train_set.fingerprint(), "val": self.val_set.fingerprint()}

    @functools.cached_property
    def marks(self) -> dict[str, np.ndarray]:
        """Sorted hashes of the images of each data set, `(N,)`, uint32."""
        return {"train": self.train_set.marks(), "val": self.val_set.marks()}

    def device_batch_size(self, world_size: int) -> int:
        """Images that one of `world_size` devices holds at a time."""
        if isinstance(self.batch_size, int):
            return self.batch_size
        # With more devices than images a device holds one image, and `accumulation` raises the error.
        return max(1, self.global_batch_size // world_size)

    def accumulation(self, world_size: int) -> int:
        """Micro-batches per optimizer step. Raises `UserError` if they do not fill a global batch."""
        return accumulation(self.global_batch_size, self.device_batch_size(world_size), world_size)

    def prepare_data(self) -> None:
        """Let the data sets write their files; Lightning calls this on one rank of each machine."""
        self.train_set.prepare()
        self.val_set.prepare()

    def setup(self, stage: str | None = None) -> None:
        """Check that every device gets its share; the data sets list their images here for the first time.

        The first process prints the numbers of images.
        """
        rank, world_size = self._rank_and_world_size()
        self.accumulation(world_size)
        require_shown(self.preview_channels, self.pixels.channels, "data.preview_channels")
        if self.num_train < 1:
            raise UserError("the training set is empty")
        if self.num_val < world_size:
            raise UserError(
                f"{self.num_val} held-out images for {world_size} devices, but each needs one: "
                "use fewer devices, or hold out more (data.val_fraction)"
            )
        _ = self.pixels  # found here once, not in every loader process
        self._groups()  # raises if the images lie in no archives
        if rank == 0:
            _print_once(self.census())

    def census(self) -> str:
        """One line on the numbers of images, and on the files that are not images."""
        line = f"images: {self.num_train:,} for training, {self.num_val:,} held out"
        others = self.train_set.passed_over()
        line = line if self.pixels == RGB_8_BIT else f"{line}, of {self.pixels}"
        return f"{line}; passed over: {others}" if others else line

    def train_dataloader(self) -> Loader:
        """Batches of this rank, up to `stop`: `image` (b, C, H, W) in [-1, 1], `index` (b,), `position` (b,).

        With cached latents, `moments` (b, M, h, w) replaces `image`.
        """
        rank, world_size = self._rank_and_world_size()
        sampler = StreamBatchSampler(
            self.num_train,
            self.global_batch_size,
            self.device_batch_size(world_size),
            seed=self.seed,
            rank=rank,
            world_size=world_size,
            start=self.images_seen,
            stop=self.stop,
            groups=self._groups(),
            window=self.shard_window,
        )
        return Loader(self._seen_in_training, batch_sampler=sampler, **self.loading())

    def _groups(self) -> Tensor | None:
        if self.order == "uniform":
            return None
        if (groups := self.train_set.groups(self.shard_window)) is None:
            raise UserError("data.order=shards: needs a set of archives, such as data.root=shards-{000..099}.tar")
        return torch.from_numpy(groups)

    @property
    def _seen_in_training(self) -> ImageDataset | CachedLatents:
        return self.train_set if self.cached is None else self.cached

    def val_dataloader(self) -> list[Loader]:
        """The held-out images; with `compare_with_training` also equally many training images, cropped the same way.

        The second set shows memorisation: its loss still falls after the held-out loss has stopped falling.
        """
        loaders = [self._share(Chosen(self.val_set, range(self.num_val)))]
        if self.compare_with_training:
            loaders.append(self._share(Chosen(self.train_set, spread(self.num_val, self.num_train))))
        return loaders

    def training_sample(self, count: int) -> Loader:
        """Batches of this rank's share of `count` training images (or of all, if there are fewer), not mirrored."""
        count = min(count, self.num_train)
        return self._share(Chosen(self._seen_in_training, spread(count, self.num_train)))

    def _share(self, images: Chosen) -> Loader:
        """Every W-th image, equally many on each rank, without repeats.

        If W does not divide the number of images, the last few (fewer than W) are dropped, so that all
        ranks run the same number of batches.
        """
        rank, world_size = self._rank_and_world_size()
        share = range(rank, len(images) // world_size * world_size, world_size)
        return Loader(images, batch_size=self.val_size(world_size), sampler=share, **self.loading())

    def val_size(self, world_size: int) -> int:
        """Images that one of `world_size` devices holds at a time in validation."""
        return self.val_batch_size or self.device_batch_size(world_size)

    def preview(self, count: int) -> Tensor:
        """The first `count` held-out images (or all, if there are fewer): `(n, C, H, W)` in [-1, 1]."""
        return torch.stack([self.val_set[index]["image"] for index in range(min(count, self.num_val))])

    def _rank_and_world_size(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def loading(self) -> dict[str, Any]:
        """Arguments of every loader: number and setup of workers, pinned memory, collation."""
        on_gpu = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        return {
            "num_workers": self.num_workers,
            "collate_fn": Collate(),
            "persistent_workers": self.num_workers > 0,
            "worker_init_fn": leave_signals_to_parent,
            "pin_memory": on_gpu,
        }


class Chosen(Dataset):
    """A subset of a data set with centre crops and no flips; `position` is the place in the subset."""

    def __init__(self, images: ImageDataset | CachedLatents, indices: Sequence[int]) -> None:
        self.images, self.indices = images, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> dict[str, Any]:
        return {**self.images[self.indices[place]], "position": place}

    def __getitems__(self, places: list[int]) -> list[dict[str, Any]]:
        if not hasattr(self.images, "__getitems__"):
            return [self[place] for place in places]
        items = self.images.__getitems__([self.indices[place] for place in places])
        return [{**item, "position": place} for item, place in zip(items, places, strict=True)]


@functools.cache
def _print_once(line: str) -> None:
    """Print a line once, as both stages, validation and training set up the same images."""
    print(line, flush=True)

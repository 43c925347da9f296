"""Nearest training images of samples."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lightning import Trainer
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from ldm_lab.data.datamodule import Chosen
from ldm_lab.data.dataset import spread
from ldm_lab.data.loading import Loader
from ldm_lab.training.callbacks.pictures import shared
from ldm_lab.utils import float32
from ldm_lab.utils.limits import Count


class Neighbours:
    """Finds the nearest training images of samples, to show memorisation, for a few megabytes of memory.

    The distance is L2 at `side` x `side` pixels, over mirrored images too if training mirrors. The search covers an
    evenly spaced subset of the images; each rank reads its share of the subset, once.

    Args:
        samples: number of samples, the first ones.
        nearest: training images per sample.
        among: maximum number of training images to search.
        side: height and width of the compared images in pixels.
    """

    BATCH = 64  # images read at a time

    def __init__(self, samples: Count = 6, nearest: Count = 3, among: Count = 1024, side: Count = 16) -> None:
        self.samples, self.nearest, self.among, self.side = samples, nearest, among, side
        self._searched: Tensor | None = None

    @torch.no_grad()
    def beside(self, trainer: Trainer, samples: Tensor) -> Tensor:
        """The first samples with their nearest training images; every rank must call it.

        Args:
            trainer: the run's trainer.
            samples: `(B, C, H, W)` in [-1, 1], the same on all ranks.

        Returns:
            `(n, 1 + k, C, H, W)`: n samples, each followed by its k nearest images, the nearest first.
        """
        data = trainer.datamodule
        indices = spread(min(self.among, data.num_train), data.num_train)
        samples = samples[: self.samples].float().clamp(-1, 1)
        if self._searched is None:
            self._searched = shared(trainer, len(indices), lambda places: self._read(trainer, indices, places))
        views = [self._searched, self._searched.flip(-1)][: 2 if data.train_set.flip else 1]
        small = adaptive_avg_pool2d(samples, self.side).flatten(1)  # (n, C, H, W) -> (n, C S S)
        with float32.exact():  # TF32 rounds products by more than near images differ
            distances = torch.stack([torch.cdist(small, view.flatten(1)) for view in views])  # (V, n, N)
        closest, view = distances.min(0)  # (n, N)
        places = closest.topk(min(self.nearest, len(indices)), largest=False).indices  # (n, k)
        mirrored = view.gather(1, places).bool().tolist()
        rows = []
        for pair in zip(places.tolist(), mirrored, strict=True):
            images = [(data.train_set[indices[place]]["image"], flip) for place, flip in zip(*pair, strict=True)]
            rows.append(torch.stack([image.flip(-1) if flip else image for image, flip in images]))
        found = torch.stack(rows)  # n x (k, C, H, W) -> (n, k, C, H, W)
        return torch.cat([samples[:, None].cpu(), found], dim=1)

    def _read(self, trainer: Trainer, indices: Sequence[int], places: Sequence[int]) -> Tensor:
        """Read images and shrink them to `(n, C, S, S)`, on the device."""
        data = trainer.datamodule
        chosen = Chosen(data.train_set, [indices[place] for place in places])
        batches = Loader(chosen, batch_size=self.BATCH, **data.loading())
        small = [adaptive_avg_pool2d(batch["image"], self.side) for batch in batches]
        return torch.cat(small).to(trainer.strategy.root_device)

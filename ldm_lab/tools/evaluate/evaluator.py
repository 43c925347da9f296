"""Images in, figures out: one extractor, one reference, any number of sets of images that are measured against it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from torch import Tensor

from ldm_lab.data.dataset import digest
from ldm_lab.metrics import features as kinds
from ldm_lab.metrics import own, reference
from ldm_lab.metrics.extractors import Extractor
from ldm_lab.metrics.images import Pixels
from ldm_lab.metrics.reference import Reference
from ldm_lab.tools.evaluate.rows import features
from ldm_lab.tools.evaluate.scores import Scores, caution, compare, memorised, neighbour_sheet, require_two, unlike
from ldm_lab.tools.evaluate.sources import Target
from ldm_lab.utils.reading import LoadError
from ldm_lab.utils.writing import require_writable


@dataclass
class Evaluator:
    """Measures images against a target.

    Attributes:
        target: what they are compared with.
        trainer: shares the work among its devices.
        kind: of features, one of `ldm_lab.metrics.features.FEATURES`.
        weights: file of the weights of pretrained ones; None: from torch's hub.
        cache_dir: where what is computed once is kept.
        draws: replicates of the bootstrap.
        num_workers: loader processes.
    """

    target: Target
    trainer: Trainer
    kind: str
    weights: str | None
    cache_dir: Path
    draws: int = 200
    num_workers: int = 0

    @cached_property
    def extractor(self) -> Extractor:
        """Makes features.

        Raises:
            UserError: it cannot be had.
            LoadError: a file holds something else.
        """
        kinds.check(self.kind, self.weights)
        if self.kind != kinds.OWN or self.target.known is not None:
            device = self.trainer.strategy.root_device
            return kinds.make(self.kind, self.weights, self.target.known, self.cache_dir, device)
        said = (reference.read_header(self.target.statistics) or {}).get("extractor", {})
        found = own.kept(self.cache_dir, str(said.get("fingerprint")))
        if found is None:
            raise LoadError(
                f"{self.target.statistics}: its extractor {said.get('name')} is not in {own.folder(self.cache_dir)}:"
                " give the images with --data FOLDER, or --features as they were when it was saved"
            )
        return found

    @cached_property
    def reference(self) -> Reference:
        """What images are compared with. Raises `LoadError` for statistics of something else."""
        target = self.target
        own_statistics = reference.load(target.statistics, self.extractor, target.transform) if self._given else None
        if target.images is None:
            return own_statistics
        found = self._kept(target.images)
        return Reference(found.header, found.features, own_statistics and own_statistics.gaussian)

    @property
    def _given(self) -> bool:
        """Whether statistics from a file count; those beside images are Inception's."""
        return self.target.statistics is not None and (self.target.images is None or self.kind == "inception")

    @cached_property
    def held_out(self) -> Tensor | None:
        """Features of held-out images `(H, D)`, where there are some."""
        return None if self.target.held_out is None else self._kept(self.target.held_out).features

    def _kept(self, images: Pixels) -> Reference:
        """Features of real images, from the cache or computed now."""
        said = reference.header(images, self.extractor)
        path = self.cache_dir / "references" / f"{digest([json.dumps({**said, 'source': ''}, sort_keys=True)])}.npz"
        if self.trainer.strategy.broadcast(path.is_file()):
            return Reference(said, reference.load(path, self.extractor, images.transform()).features)
        if self.trainer.is_global_zero:
            require_writable(path.parent, "--cache")
        made = Reference(said, self.features(images))
        if self.trainer.is_global_zero:
            made.save(path)
        return made

    def features(self, images: Pixels) -> Tensor:
        """Those of every image: `(N, D)`."""
        return features(self.trainer, self.extractor, images, self.num_workers)

    def measure(self, found: Tensor, images: Pixels, sheet: Path) -> tuple[Scores, dict[str, Any]]:
        """All figures of some images; on the first device, the others have helped.

        Args:
            found: their features.
            images: generated ones.
            sheet: where a picture of those nearest to training images goes.

        Returns:
            The figures, and those of held-out images where there are some: what real images score.
        """
        real, held_out, device = self.reference, self.held_out, exact_device(self.trainer)
        if not self.trainer.is_global_zero:
            return {}, {}
        found, distance = found.to(device), self.extractor.distance
        scores, beside = compare(found, real, distance, self.draws), {}
        if held_out is not None and real.features is not None:
            held_out = held_out.to(device)
            equal = held_out[: len(found)]  # as many, where there are so many: figures depend on it
            floor = compare(equal, real, distance, 0)
            beside = {"count": len(equal), "metrics": {name: {"value": one.value} for name, one in floor.items()}}
            copies, neighbours = memorised(found, real.features.to(device), held_out, self.draws)
            scores |= copies
            neighbour_sheet(neighbours, images, self.target.images, sheet)
        return scores, beside

    def check(self, count: int, jpeg: float | None = None) -> None:
        """Say where figures will be wrong: images are too few, or were compressed unlike the real ones.

        Args:
            count: how many images.
            jpeg: see `Pixels.jpeg`.

        Raises:
            UserError: they are less than two.
        """
        fewest = count if self.target.images is None else min(count, len(self.target.images))
        require_two(fewest)  # before an extractor is trained
        real = None if self.target.images is None else self.target.images.jpeg()
        for said in (caution(fewest, self.extractor.dimension), unlike(jpeg, real)):
            if said and self.trainer.is_global_zero:
                print(said, flush=True)


def exact_device(trainer: Trainer) -> torch.device:
    """Where float64 is computed: some accelerators have none."""
    device = trainer.strategy.root_device
    return device if device.type == "cuda" else torch.device("cpu")

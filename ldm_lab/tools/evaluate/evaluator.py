"""Computes metrics of sets of images, with one feature extractor, against one reference set."""

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
from ldm_lab.tools.evaluate.rows import rows
from ldm_lab.tools.evaluate.scores import Scores, caution, compare, memorised, neighbour_sheet, require_two, unlike
from ldm_lab.tools.evaluate.sources import Target
from ldm_lab.utils.reading import LoadError
from ldm_lab.utils.writing import require_writable


@dataclass
class Evaluator:
    """Computes metrics of images against a target.

    Attributes:
        target: the real images to compare with.
        trainer: distributes the work over its devices.
        kind: kind of features, one of `ldm_lab.metrics.features.FEATURES`.
        weights: file of pretrained weights; None: from torch's hub.
        cache_dir: folder of cached extractors and features.
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
        """The feature extractor.

        Raises:
            UserError: the extractor is not available.
            LoadError: a file has the wrong content.
        """
        kinds.check(self.kind, self.weights)
        if self.kind != kinds.OWN or self.target.known is not None:
            device = self.trainer.strategy.root_device
            return kinds.make(self.kind, self.weights, self.target.known, self.cache_dir, device)
        stored = (reference.read_header(self.target.statistics) or {}).get("extractor", {})
        found = own.kept(self.cache_dir, str(stored.get("fingerprint")))
        if found is None:
            raise LoadError(
                f"{self.target.statistics}: its extractor {stored.get('name')} is not in {own.folder(self.cache_dir)}:"
                " give the images with --data FOLDER, or --features as they were when it was saved"
            )
        return found

    @cached_property
    def reference(self) -> Reference:
        """The reference set. Raises `LoadError` for statistics of another extractor or transform."""
        target = self.target
        own_statistics = reference.load(target.statistics, self.extractor, target.transform) if self._given else None
        if target.images is None:
            return own_statistics
        found = self._kept(target.images)
        return Reference(found.header, found.features, own_statistics and own_statistics.gaussian)

    @property
    def _given(self) -> bool:
        """Whether to use statistics from a file; statistics that come with images are Inception's."""
        return self.target.statistics is not None and (self.target.images is None or self.kind == "inception")

    @cached_property
    def held_out(self) -> Tensor | None:
        """Features of held-out images `(H, D)`; None without held-out images."""
        return None if self.target.held_out is None else self._kept(self.target.held_out).features

    def _kept(self, images: Pixels) -> Reference:
        """Features of real images, from the cache or computed now and cached."""
        header = reference.header(images, self.extractor)
        path = self.cache_dir / "references" / f"{digest([json.dumps({**header, 'source': ''}, sort_keys=True)])}.npz"
        if self.trainer.strategy.broadcast(path.is_file()):
            return Reference(header, reference.load(path, self.extractor, images.transform()).features)
        if self.trainer.is_global_zero:
            require_writable(path.parent, "--cache")
        made = Reference(header, self.features(images))
        if self.trainer.is_global_zero:
            made.save(path)
        return made

    def features(self, images: Pixels) -> Tensor:
        """Features of every image: `(N, D)`, float32."""
        extractor = self.extractor
        return rows(self.trainer, extractor, images, extractor, extractor.dimension, self.num_workers)

    def measure(self, found: Tensor, images: Pixels, sheet: Path) -> tuple[Scores, dict[str, Any]]:
        """All metrics of some images, on the first rank; other ranks return empty results.

        Args:
            found: features of the images.
            images: generated images.
            sheet: file for the picture of the images nearest to training images.

        Returns:
            The metrics, and the metrics of held-out images, if any, as the score of real images.
        """
        real, held_out, device = self.reference, self.held_out, exact_device(self.trainer)
        if not self.trainer.is_global_zero:
            return {}, {}
        found, distance = found.to(device), self.extractor.distance
        scores, beside = compare(found, real, distance, self.draws), {}
        if held_out is not None and real.features is not None:
            held_out = held_out.to(device)
            equal = held_out[: len(found)]  # equally many, if possible, as metrics depend on the number
            floor = compare(equal, real, distance, 0)
            beside = {"count": len(equal), "metrics": {name: {"value": one.value} for name, one in floor.items()}}
            copies, neighbours = memorised(found, real.features.to(device), held_out, self.draws)
            scores |= copies
            neighbour_sheet(neighbours, images, self.target.images, sheet)
        return scores, beside

    def check(self, count: int, jpeg: float | None = None) -> None:
        """Warn of wrong metrics: too few images, or JPEG compression that differs from the real images.

        Args:
            count: number of images.
            jpeg: see `Pixels.jpeg`.

        Raises:
            UserError: there are fewer than two images.
        """
        fewest = count if self.target.images is None else min(count, len(self.target.images))
        require_two(fewest)  # before training an extractor
        real = None if self.target.images is None else self.target.images.jpeg()
        for warning in (caution(fewest, self.extractor.dimension), unlike(jpeg, real)):
            if warning and self.trainer.is_global_zero:
                print(warning, flush=True)


def exact_device(trainer: Trainer) -> torch.device:
    """The device for float64: the GPU with CUDA, else the CPU, as some accelerators have no float64."""
    device = trainer.strategy.root_device
    return device if device.type == "cuda" else torch.device("cpu")

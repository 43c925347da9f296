"""Scaling benchmarks: batch size, sampling steps, image size and data set size."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ldm_lab.data.images import FolderImages
from ldm_lab.data.latents import CachedLatents, LatentCache
from ldm_lab.pipeline import LDMPipeline
from ldm_lab.tools.benchmark.contest import Contestant
from ldm_lab.tools.benchmark.subjects import Subject, sample
from ldm_lab.training.latents import latent_shape

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)
STEPS = (10, 20, 50, 100, 200)
SIDES = (64, 128, 256, 512, 1024)  # pixels
IMAGES = (10**3, 10**4, 10**5, 10**6)
TILE = 64  # side of a tile in latent positions, for `enable_tiling`
LINKS = 10_000  # hard links per file and files per folder, which file systems allow


def contestants(subject: Subject) -> list[Contestant]:
    """A contestant of each size."""
    return [*_batches(subject), *_steps(subject), *_sides(subject), *_data_sets(subject.folder)]


def _batches(subject: Subject) -> Iterator[Contestant]:
    for size in BATCH_SIZES:
        (found,) = sample(replace(subject, batch_size=size, against=False))
        yield replace(found, name=f"sample, batch {size}, {subject.steps} steps")


def _steps(subject: Subject) -> Iterator[Contestant]:
    for steps in STEPS:
        (found,) = sample(replace(subject, batch_size=1, steps=steps, against=False))
        yield replace(found, name=f"sample, batch 1, {steps} steps")


def _sides(subject: Subject) -> Iterator[Contestant]:
    """Decoding of one image at once and, if it is larger than a tile, in tiles."""
    pipe, vqvae = subject.pipe, subject.pipe.vqvae
    for side in SIDES:
        latents = torch.randn(1, *latent_shape(vqvae, (side, side)), device=subject.device)
        runs = {f"decode {side} x {side}": partial(_decode, pipe, latents)}
        if latents.shape[-1] > TILE:
            runs[f"decode {side} x {side}, tiles"] = partial(_decode_in_tiles, pipe, latents)
        for name, run in runs.items():
            yield Contestant(name, run, 1, subject.dtype, pipe.compile)


@torch.no_grad()
def _decode(pipe: LDMPipeline, latents: Tensor) -> None:
    pipe.decode(latents)


def _decode_in_tiles(pipe: LDMPipeline, latents: Tensor) -> None:
    pipe.vqvae.enable_tiling(TILE, TILE // 4)
    _decode(pipe, latents)
    pipe.vqvae.disable_tiling()


def _data_sets(folder: Path) -> Iterator[Contestant]:
    """Time to the first image of a folder, and to the last latents of a cache, from scratch."""
    for count in IMAGES:
        pictures = folder / f"pictures_{count}"
        link_pictures(pictures, count)
        yield Contestant(f"folder of {count:,} images", partial(_open_folder, pictures))
    images = FolderImages(folder / f"pictures_{IMAGES[0]}", "train", 16)
    for count in IMAGES:
        cache = LatentCache(folder / "caches", {}, count, (1, 4, 8, 8), "float16")
        link_shards(cache)
        yield Contestant(f"cache of {count:,} latents", partial(_open_cache, cache, images))


def _open_folder(folder: Path) -> None:
    FolderImages(folder, "train", 16)[0]


def _open_cache(cache: LatentCache, images: FolderImages) -> None:
    latents = CachedLatents(cache, images)
    for shard in () if cache.missing() else cache.shards:  # training opens all shards first
        latents.shard(shard)
    latents[cache.count - 1]


def link_pictures(folder: Path, count: int) -> None:
    """Make a nested folder of small pictures, most of them hard links."""
    for first in range(0, count, LINKS):
        part = folder / f"{first // LINKS:04}"
        part.mkdir(parents=True)
        original = part / "00000.png"
        Image.new("RGB", (16, 16)).save(original)
        for index in range(1, min(LINKS, count - first)):
            os.link(original, part / f"{index:05}.png")


def link_shards(cache: LatentCache) -> None:
    """Make all shards of a cache, of zeros, most of them hard links."""
    cache.open_folder()
    for shard in {0, cache.shards[-1]}:
        cache.write(shard, torch.zeros(len(cache.indices(shard)), *cache.shape), {})
    for shard in cache.shards[1:-1]:
        os.link(cache.path(0), cache.path(shard))

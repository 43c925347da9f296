"""Benchmarks of data loading (images per second from files) and of command start-up (seconds)."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader

from ldm_lab.config.files import CONFIGS
from ldm_lab.data.images import FolderImages
from ldm_lab.tools.benchmark.contest import Contestant

DRAWN, SIDE = 32, 1024  # number and side in pixels of the JPEGs to read by default


def draw_pictures(folder: Path) -> None:
    """Write JPEGs of quality 90 with edges, gradients and grain, about as slow to decode as photographs."""
    for index in range(DRAWN):
        generator = np.random.default_rng(index)
        small = generator.integers(0, 256, (SIDE // 32, SIDE // 32, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(small).resize((SIDE, SIDE), Image.Resampling.BICUBIC), dtype=np.int16)
        grain = generator.integers(-12, 13, smooth.shape, dtype=np.int16)
        pixels = np.clip(smooth + grain, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:03}.jpg", quality=90)


def loaders(root: Path, size: int, batch_size: int, workers: int, against: bool) -> list[Contestant]:
    """An epoch of `FolderImages`, and of torchvision's `ImageFolder` with its usual transforms of PIL images.

    Args:
        root: a folder of images.
        size: side of the crops in pixels.
        batch_size: images per batch.
        workers: processes per loader.
        against: whether torchvision takes part.
    """
    images = FolderImages(root, "train", size)
    options = {"batch_size": batch_size, "num_workers": workers, "persistent_workers": workers > 0}
    contestants = [_epoch("ldm_lab", DataLoader(images, **options), len(images))]
    if against:
        from torchvision import datasets, transforms

        steps = [transforms.Resize(size), transforms.CenterCrop(size), transforms.ToTensor()]
        steps.append(transforms.Normalize(0.5, 0.5))
        # ImageFolder expects a folder of class folders: the parent.
        folder = datasets.ImageFolder(
            root.parent, transforms.Compose(steps), is_valid_file=lambda path: Path(path).parent == root,
            allow_empty=True,
        )  # fmt: skip
        contestants.append(_epoch("torchvision", DataLoader(folder, **options), len(folder)))
    return contestants


def _epoch(name: str, loader: DataLoader, images: int) -> Contestant:
    def run() -> None:
        for _ in loader:
            pass

    return Contestant(name, run, images)


def commands(against: bool) -> Iterator[Contestant]:
    """Whole processes, from start to end, `import torch` first."""
    yield _process("import torch", ["-c", "import torch"])
    yield _process("ldm_lab.LDMPipeline", ["-c", "import ldm_lab; ldm_lab.LDMPipeline"])
    for script in ("train.py", "sample.py"):
        if (path := CONFIGS.with_name(script)).is_file():  # missing in an installed package
            yield _process(f"{script} --help", [str(path), "--help"])
    if against and importlib.util.find_spec("diffusers"):
        yield _process("diffusers.LDMPipeline", ["-c", "import diffusers; diffusers.LDMPipeline"])


def _process(name: str, arguments: list[str]) -> Contestant:
    def run() -> None:
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, cwd=CONFIGS.parent)

    return Contestant(name, run)

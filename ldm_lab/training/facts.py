"""What a stage is made of, in numbers: for whoever compares runs."""

from __future__ import annotations

import contextlib
import subprocess
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from ldm_lab.data.datamodule import ImageDataModule
from ldm_lab.data.dataset import digest
from ldm_lab.models.first_stage import FirstStage
from ldm_lab.models.pretrained import PretrainedModel
from ldm_lab.training.latents import latent_shape
from ldm_lab.training.stage_module import StageModule
from ldm_lab.utils.version import __version__

ROOT = Path(__file__).resolve().parents[2]


def facts(module: StageModule, data: ImageDataModule) -> dict[str, Any]:
    """As plain data:

    `version`, `git_commit` (None where there is no repository), `data` (fingerprints of the images by split),
    `parameters` of the network that is trained, and `flops_per_image` (see there).
    """
    _, network = next(iter(module.exported().values()))
    found = {
        "version": __version__,
        "git_commit": git_commit(),
        "data": {split: digest(marks.tolist()) for split, marks in data.marks.items()},
        "parameters": network.num_parameters(),
    }
    with contextlib.suppress(Exception):  # a network of a plugin may do what cannot be done without content
        found["flops_per_image"] = flops_per_image(network, module.autoencoder, data.image_size)
    return found


def git_commit() -> str | None:
    """The commit of the code, where it lies in a repository of its own."""
    if not (ROOT / ".git").exists():
        return None
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    return None


def flops_per_image(network: PretrainedModel, autoencoder: FirstStage, image_size: tuple[int, int]) -> int:
    """Floating-point operations for one image, two to a multiply-add, of products and convolutions alone.

    Of a first stage to encode and decode it; of a UNet to predict once from its latents. No backward pass.

    Args:
        network: is built once more, without content.
        autoencoder: makes the latents.
        image_size: (height, width) in pixels.
    """
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        empty = type(network).from_config(network.config)
        if isinstance(empty, FirstStage):
            empty.decode(empty.latents(torch.empty(1, 3, *image_size)))
        else:
            empty(torch.empty(1, *latent_shape(autoencoder, image_size)), torch.zeros(1))
    return counter.get_total_flops()

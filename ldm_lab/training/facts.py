"""Facts about a stage for comparing runs: version, data, parameters, FLOPs."""

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
    """The facts as plain data.

    `version`, `git_commit` (None without a repository), `data` (fingerprints of the images by split),
    `parameters` of the trained network, and `flops_per_image` (see the function).
    """
    _, network = next(iter(module.exported().values()))
    found = {
        "version": __version__,
        "git_commit": git_commit(),
        "data": {split: digest(marks.tolist()) for split, marks in data.marks.items()},
        "parameters": network.num_parameters(),
    }
    with contextlib.suppress(Exception):  # a plugin's network may not run on the meta device
        found["flops_per_image"] = flops_per_image(network, module.autoencoder, data.image_size)
    return found


def git_commit() -> str | None:
    """The commit of the code, or None if the package is not in its own git repository."""
    if not (ROOT / ".git").exists():
        return None
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    return None


def flops_per_image(network: PretrainedModel, autoencoder: FirstStage, image_size: tuple[int, int]) -> int:
    """Floating-point operations per image in matrix products and convolutions; a multiply-add counts as two.

    For a first stage: encode and decode. For a UNet: one prediction. The backward pass is not counted.

    Args:
        network: its config is built again on the meta device.
        autoencoder: determines the latent shape.
        image_size: (height, width) in pixels.
    """
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        empty = type(network).from_config(network.config)
        if isinstance(empty, FirstStage):
            empty.decode(empty.latents(torch.empty(1, empty.config.in_channels, *image_size)))
        else:
            empty(torch.empty(1, *latent_shape(autoencoder, image_size)), torch.zeros(1))
    return counter.get_total_flops()

"""Unconditional latent diffusion (Rombach et al. 2022, arXiv 2112.10752) with Lightning and Hydra.

The public names are imported when they are first used: `import ldm_lab` itself costs nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

from ldm_lab.utils import moved
from ldm_lab.utils.version import __version__

moved.install()

_HOMES = {
    "AutoencoderKL": "ldm_lab.models.kl_model",
    "DDIMScheduler": "ldm_lab.diffusion.ddim",
    "DDPMScheduler": "ldm_lab.diffusion.ddpm",
    "DPMSolverMultistepScheduler": "ldm_lab.diffusion.dpm_solver",
    "FlowMatchEulerDiscreteScheduler": "ldm_lab.diffusion.flow_euler",
    "FlowMatchHeunDiscreteScheduler": "ldm_lab.diffusion.flow_heun",
    "LDMPipeline": "ldm_lab.pipeline",
    "ImagePipelineOutput": "ldm_lab.models.outputs",
    "UNet2DModel": "ldm_lab.models.unet",
    "VQModel": "ldm_lab.models.vq_model",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:  # noqa: ANN401
    if name not in _HOMES:
        raise AttributeError(f"module 'ldm_lab' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])

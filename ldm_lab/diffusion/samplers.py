"""Samplers by name, and switching the sampler of a model."""

from __future__ import annotations

import inspect
from typing import Any

from ldm_lab.diffusion.ddim import DDIMScheduler
from ldm_lab.diffusion.ddpm import DDPMScheduler
from ldm_lab.diffusion.dpm_solver import LEVELS, DPMSolverMultistepScheduler
from ldm_lab.diffusion.scheduler import Scheduler
from ldm_lab.utils.errors import UserError

SAMPLERS: dict[str, type[Scheduler]] = {
    "ddim": DDIMScheduler,
    "ddpm": DDPMScheduler,
    "dpm_solver": DPMSolverMultistepScheduler,
}

# Settings of the visited timesteps belong to the sampler, not to the model.
GRID = ("timestep_spacing", "steps_offset", *LEVELS)


def named(name: str) -> type[Scheduler]:
    """The class of a sampler. Raises `UserError` if the name is not in `SAMPLERS`."""
    if name not in SAMPLERS:
        raise UserError(f"sampler={name}: there are {', '.join(SAMPLERS)}")
    return SAMPLERS[name]


def choose(name: str, scheduler: Scheduler, eta: float = 0.0) -> Scheduler:
    """Make the named sampler for the model with the given `scheduler`.

    A sampler of the same class keeps all settings. A sampler of another class keeps the settings of training (noise
    schedule, prediction type), clipping and thresholding, and the final noise level, so that with more steps all
    samplers converge to the same solution. It chooses its own timesteps: CompVis's offset for DDIM would put the first
    of DDPM's 1000 steps out of range, and DPM-Solver needs levels that are even in λ. Only "trailing" is kept, as it is
    set if a chain must start at pure noise.

    >>> choose("dpm_solver", DDIMScheduler(set_alpha_to_one=False)).config.final_sigmas_type
    'sigma_min'

    Args:
        name: one of `SAMPLERS`.
        scheduler: the model's scheduler; it is not changed.
        eta: η for later steps.

    Raises:
        UserError: there is no such sampler, or it does not support this eta.
    """
    kind = named(name)
    if eta and "eta" not in inspect.signature(kind.step).parameters:
        raise UserError(f"sampler.eta={eta}: {name} has none; use sampler=ddim or sampler.eta=0")
    if isinstance(scheduler, kind):
        return type(scheduler).from_config(scheduler.config)
    known = inspect.signature(kind.__init__).parameters
    return kind.from_config({key: value for key, value in _model_settings(scheduler).items() if key in known})


def _model_settings(scheduler: Scheduler) -> dict[str, Any]:
    """The settings that belong to the model, under the names of every sampler."""
    config, ends_clean = scheduler.config, float(scheduler.final_alpha_cumprod) == 1
    kept = {key: value for key, value in config.items() if key not in GRID}
    if config.timestep_spacing == "trailing":
        kept["timestep_spacing"] = "trailing"
    return {
        "clip_sample": False,  # a scheduler without this setting does not clip, but the default elsewhere is to clip
        **kept,
        "set_alpha_to_one": ends_clean,
        "final_sigmas_type": "zero" if ends_clean else "sigma_min",
        "use_lu_lambdas": True,  # even in t, DPM-Solver is no better than DDIM, as its last step is too long
    }

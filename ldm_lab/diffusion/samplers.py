"""Samplers by name, and switching the sampler of a model."""

from __future__ import annotations

import inspect
from typing import Any

from ldm_lab.diffusion.ddim import DDIMScheduler
from ldm_lab.diffusion.ddpm import DDPMScheduler
from ldm_lab.diffusion.dpm_solver import LEVELS, DPMSolverMultistepScheduler
from ldm_lab.diffusion.flow import is_flow
from ldm_lab.diffusion.flow_euler import FlowMatchEulerDiscreteScheduler
from ldm_lab.diffusion.flow_heun import FlowMatchHeunDiscreteScheduler
from ldm_lab.diffusion.process import Process
from ldm_lab.utils.errors import UserError

SAMPLERS: dict[str, type[Process]] = {
    "ddim": DDIMScheduler,
    "ddpm": DDPMScheduler,
    "dpm_solver": DPMSolverMultistepScheduler,
    "flow_euler": FlowMatchEulerDiscreteScheduler,
    "flow_heun": FlowMatchHeunDiscreteScheduler,
}

# Settings of the visited timesteps belong to the sampler, not to the model.
GRID = ("timestep_spacing", "steps_offset", *LEVELS)


def named(name: str) -> type[Process]:
    """The class of a sampler. Raises `UserError` if the name is not in `SAMPLERS`."""
    if name not in SAMPLERS:
        raise UserError(f"sampler={name}: there are {', '.join(SAMPLERS)}")
    return SAMPLERS[name]


def choose(name: str, scheduler: Process, eta: float = 0.0) -> Process:
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
        UserError: there is no such sampler, it does not support this eta, or it is for another process than the model.
    """
    kind = named(name)
    require_process(name, scheduler)
    if eta and "eta" not in inspect.signature(kind.step).parameters:
        other = "" if is_flow(kind) else "sampler=ddim or "
        raise UserError(f"sampler.eta={eta}: {name} has none; use {other}sampler.eta=0")
    if isinstance(scheduler, kind):
        return type(scheduler).from_config(scheduler.config)
    known = inspect.signature(kind.__init__).parameters
    return kind.from_config({key: value for key, value in _model_settings(scheduler).items() if key in known})


def require_process(name: str, scheduler: Process) -> None:
    """Raise `UserError` unless the named sampler is for the process of a model with this scheduler."""
    straight = is_flow(type(scheduler))
    if is_flow(named(name)) != straight:
        trained = "by flow matching" if straight else "as a diffusion, not by flow matching"
        *others, last = [one for one, kind in SAMPLERS.items() if is_flow(kind) == straight]
        raise UserError(f"sampler={name}: the model was trained {trained}; use sampler={', '.join(others)} or {last}")


def _model_settings(scheduler: Process) -> dict[str, Any]:
    """The settings that belong to the model, under the names of every sampler."""
    if is_flow(type(scheduler)):
        return scheduler.config
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

"""The samplers by name, and how one takes over from another on the same model."""

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

# Which timesteps are visited is the sampler's choice, not the model's.
GRID = ("timestep_spacing", "steps_offset", *LEVELS)


def named(name: str) -> type[Scheduler]:
    """The class of a sampler. Raises `UserError` for a name that is not in `SAMPLERS`."""
    if name not in SAMPLERS:
        raise UserError(f"sampler={name}: there are {', '.join(SAMPLERS)}")
    return SAMPLERS[name]


def takes_eta(kind: type[Scheduler]) -> bool:
    """Whether the steps of a sampler may add noise of a chosen amount."""
    return "eta" in inspect.signature(kind.step).parameters


def choose(name: str, scheduler: Scheduler, eta: float = 0.0) -> Scheduler:
    """The sampler of that name for the model that `scheduler` belongs to.

    A sampler of the same kind keeps all its settings. Another kind takes over what the network was trained with (noise
    schedule, prediction type), clipping and thresholding, and the noise level that the chain ends at: with more steps
    all come to the same solution. The timesteps are its own: CompVis's offset, meant for DDIM, would put the first of
    1000 steps of DDPM out of range, and DPM-Solver needs levels that are even in λ. "trailing" alone stays: it is set
    where a chain must start at pure noise.

    >>> choose("dpm_solver", DDIMScheduler(set_alpha_to_one=False)).config.final_sigmas_type
    'sigma_min'

    Args:
        name: one of `SAMPLERS`.
        scheduler: of the model; it is not changed.
        eta: η that the sampler will be asked for.

    Raises:
        UserError: there is no such sampler, or it takes no eta.
    """
    kind = named(name)
    if eta and not takes_eta(kind):
        raise UserError(f"sampler.eta={eta}: {name} has none; use sampler=ddim or sampler.eta=0")
    if isinstance(scheduler, kind):
        return type(scheduler).from_config(scheduler.config)
    known = inspect.signature(kind.__init__).parameters
    return kind.from_config({key: value for key, value in _model_settings(scheduler).items() if key in known})


def _model_settings(scheduler: Scheduler) -> dict[str, Any]:
    """What of a config belongs to the model, in the words of every sampler."""
    config, ends_clean = scheduler.config, float(scheduler.final_alpha_cumprod) == 1
    kept = {key: value for key, value in config.items() if key not in GRID}
    if config.timestep_spacing == "trailing":
        kept["timestep_spacing"] = "trailing"
    return {
        "clip_sample": False,  # a sampler without this setting does not clip; the default of the others is to do so
        **kept,
        "set_alpha_to_one": ends_clean,
        "final_sigmas_type": "zero" if ends_clean else "sigma_min",
        "use_lu_lambdas": True,  # even in t, DPM-Solver is no better than DDIM: its last step is too long
    }

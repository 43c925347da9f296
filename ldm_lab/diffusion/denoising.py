"""The reverse process, step by step: sampling, and whoever looks on."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ldm_lab.diffusion.scheduler import Scheduler, SchedulerOutput
from ldm_lab.utils.errors import UserError
from ldm_lab.utils.transfer import to_device


class UNet(Protocol):
    """What predicts: `unet(latents, timestep).sample`."""

    dtype: torch.dtype

    def __call__(self, sample: Tensor, timestep: Tensor) -> Any:  # noqa: ANN401
        """`(B, C, h, w)` and a timestep -> something with `.sample`, alike."""


@torch.no_grad()
def denoise(
    unet: UNet,
    scheduler: Scheduler,
    latents: Tensor,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    eta: float = 0.0,
    noise: Callable[[], Tensor] | None = None,
) -> Iterator[tuple[Tensor, SchedulerOutput]]:
    """Visit the timesteps that the scheduler was set to; the latents stay float32 whatever type the network has.

    Args:
        unet: predicts what `scheduler.config.prediction_type` says.
        scheduler: after `set_timesteps`; one of diffusers does as well.
        latents: `(B, C, h, w)` at the first of the timesteps, on the network's device.
        generator: of the noise that steps add; a list has one per image.
        eta: see `DDIMScheduler.step`.
        noise: makes the noise of each step, `(B, C, h, w)`, in the place of `generator`; called in every step. For
            schedulers of this package.

    Yields:
        Each timestep, 0-dim on the CPU, and the step's `prev_sample` and `pred_original_sample` (of a scheduler of
        diffusers: where it tells).

    Raises:
        UserError: `eta` is not 0 and the scheduler has none.
    """
    known = inspect.signature(scheduler.step).parameters
    if eta and "eta" not in known:
        raise UserError(f"eta is {eta}, but {type(scheduler).__name__} has none: use DDIMScheduler or eta=0")
    options = {key: value for key, value in {"eta": eta, "generator": generator}.items() if key in known}
    on_device = to_device(scheduler.timesteps, latents.device)  # all at once; the scheduler's own stay on the CPU
    latents = latents.float()  # (B, C, h, w)
    for index, timestep in enumerate(scheduler.timesteps):
        model_input = scheduler.scale_model_input(latents, timestep).to(unet.dtype)
        prediction = unet(model_input, on_device[index]).sample
        prediction = prediction.to(torch.float32, copy=True)  # the next call may overwrite its output
        drawn = {} if noise is None else {"generator": None, "variance_noise": noise()}
        output = scheduler.step(prediction, timestep, latents, **{**options, **drawn})
        latents = output.prev_sample
        yield timestep, output

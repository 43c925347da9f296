"""The reverse process as an iterator over steps, for sampling and for showing its progress."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ldm_lab.diffusion.process import Process, SchedulerOutput
from ldm_lab.utils.errors import UserError
from ldm_lab.utils.transfer import to_device


class UNet(Protocol):
    """Protocol of a denoising network: `unet(latents, timestep).sample`."""

    dtype: torch.dtype

    def __call__(self, sample: Tensor, timestep: Tensor) -> Any:  # noqa: ANN401
        """`(B, C, h, w)` and a timestep -> an object with `.sample` of the same shape."""


@torch.no_grad()
def denoise(
    unet: UNet,
    scheduler: Process,
    latents: Tensor,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    eta: float = 0.0,
    noise: Callable[[], Tensor] | None = None,
) -> Iterator[tuple[Tensor, SchedulerOutput]]:
    """Denoise latents over the scheduler's timesteps; latents stay float32 for any dtype of the network.

    Args:
        unet: network that predicts `scheduler.config.prediction_type`.
        scheduler: a scheduler after `set_timesteps`, of this package or of diffusers.
        latents: `(B, C, h, w)` at the first timestep, on the network's device.
        generator: generator of the noise that steps add; a list has one per image.
        eta: see `DDIMScheduler.step`.
        noise: makes the noise of each step, `(B, C, h, w)`, instead of `generator`; called in every step. Only for
            schedulers of this package.

    Yields:
        Each timestep, 0-dim on the CPU, and the step's `prev_sample` and `pred_original_sample` (for diffusers'
        schedulers, if they return it).

    Raises:
        UserError: `eta` is not 0, and the scheduler does not support it.
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
        prediction = prediction.to(torch.float32, copy=True)  # the next call may overwrite the network's output
        drawn = {} if noise is None else {"generator": None, "variance_noise": noise()}
        output = scheduler.step(prediction, timestep, latents, **{**options, **drawn})
        latents = output.prev_sample
        yield timestep, output

"""The reverse process as an iterator over steps, for sampling and for showing its progress."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ldm_lab.diffusion.guidance import Denoiser, GuidedModel
from ldm_lab.diffusion.process import Process, SchedulerOutput
from ldm_lab.utils.errors import UserError
from ldm_lab.utils.transfer import to_device


@torch.no_grad()
def denoise(
    unet: Denoiser,
    scheduler: Process,
    latents: Tensor,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    eta: float = 0.0,
    noise: Callable[[], Tensor] | None = None,
) -> Iterator[tuple[Tensor, SchedulerOutput]]:
    """Denoise latents over the scheduler's timesteps; latents stay float32 for any dtype of the network.

    Args:
        unet: network that predicts `scheduler.config.prediction_type`, alone or with a guide.
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
        network = unet.at(timestep) if isinstance(unet, GuidedModel) else unet
        prediction = network(model_input, on_device[index]).sample
        prediction = prediction.to(torch.float32, copy=True)  # the next call may overwrite the network's output
        drawn = {} if noise is None else {"generator": None, "variance_noise": noise()}
        output = scheduler.step(prediction, timestep, latents, **{**options, **drawn})
        latents = output.prev_sample
        yield timestep, output

"""Builds the same model in diffusers for comparison; needs the extra `[benchmark]`."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from ldm_lab.models.pretrained import PretrainedModel
from ldm_lab.pipeline import LDMPipeline
from ldm_lab.utils.errors import UserError


def library() -> ModuleType:
    """The module diffusers. Raises `UserError` if it is not installed."""
    try:
        import diffusers
    except ImportError as error:
        raise UserError("--against diffusers: it is not installed; pip install 'ldm_lab[benchmark]'") from error
    diffusers.utils.logging.set_verbosity_error()
    return diffusers


def network(own: PretrainedModel) -> Any:  # noqa: ANN401
    """The diffusers network of the same name, weights, device and dtype, in evaluation mode.

    Raises:
        UserError: diffusers has no such network.
    """
    kind = getattr(library(), own.class_name(), None)
    if kind is None:
        raise UserError(f"--against diffusers: it has no {own.class_name()}")
    twin = kind.from_config(dict(own.config))
    twin.load_state_dict({key: value.contiguous() for key, value in own.exported_state_dict().items()})
    return twin.to(device=own.device, dtype=own.dtype).eval()


def pipeline(own: LDMPipeline) -> Any:  # noqa: ANN401
    """The diffusers pipeline of the same networks, with DDIM."""
    diffusers = library()
    scheduler = diffusers.DDIMScheduler.from_config(dict(own.scheduler.config))
    twin = diffusers.LDMPipeline(vqvae=network(own.vqvae), unet=network(own.unet), scheduler=scheduler)
    twin.set_progress_bar_config(disable=True)
    # numpy has no bfloat16, which autocast returns.
    twin.vqvae.decoder.register_forward_hook(lambda _, inputs, output: output.float())
    return twin

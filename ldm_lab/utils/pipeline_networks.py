"""The networks of a pipeline: their device and dtype, moving and compiling them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from typing_extensions import Self

from ldm_lab.utils.compiled import compile_for_inference


class PipelineNetworks:
    """Mixin for a pipeline with a first stage `vqvae`, a denoising network `unet`, and perhaps a `guide` for it."""

    vqvae: Any
    unet: Any
    guide: Any

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The networks by name; the guide only if there is one."""
        guide = {} if self.guide is None else {"guide": self.guide}
        return {"vqvae": self.vqvae, "unet": self.unet, **guide}

    @property
    def device(self) -> torch.device:
        """Device of the networks."""
        return self.unet.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the networks."""
        return self.unet.dtype

    def to(self, *args: Any, **kwargs: Any) -> Self:  # noqa: ANN401
        """Move all networks to a device and/or dtype, as `torch.nn.Module.to`."""
        for network in self.networks.values():
            network.to(*args, **kwargs)
        return self

    def compile(self) -> Self:
        """Compile the networks in place for their device; the first call of each batch size takes minutes.

        Images stay the same up to rounding. Weights must not change any more (see `compile_for_inference`).
        """
        compile_for_inference(self.unet, graphs=True)
        if self.guide is not None:
            compile_for_inference(getattr(self.guide, "network", self.guide), graphs=True)  # inside of a `Converted`
        if self.device.type != "cpu":  # there the eager decoder does less arithmetic (see `Conv3x3`)
            compile_for_inference(self.vqvae.decoder)
        return self

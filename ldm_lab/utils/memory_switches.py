"""The memory-saving methods of diffusers' pipelines: their effect here, or the feature that replaces them."""

from __future__ import annotations

from typing import Any

import torch
from typing_extensions import Self

from ldm_lab.utils.pipeline_networks import PipelineNetworks
from ldm_lab.utils.terminal import say_once

ATTENTION = "attention is torch's scaled_dot_product_attention, which never holds the whole matrix of its weights"


class MemorySwitches(PipelineNetworks):
    """Mixin for a pipeline; a method without effect here says so once."""

    def enable_vae_slicing(self) -> None:
        """Decode the images of a batch one by one: see `FirstStage.enable_slicing`."""
        self.vqvae.enable_slicing()

    def disable_vae_slicing(self) -> None:
        """Decode a whole batch at once."""
        self.vqvae.disable_slicing()

    def enable_vae_tiling(self) -> None:
        """Decode large images in tiles: see `FirstStage.enable_tiling`."""
        self.vqvae.enable_tiling()

    def disable_vae_tiling(self) -> None:
        """Decode images of any size at once."""
        self.vqvae.disable_tiling()

    def enable_attention_slicing(self, slice_size: str | int | None = "auto") -> None:
        """Has no effect: see `ATTENTION`."""
        say_once(f"enable_attention_slicing has no effect: {ATTENTION}")

    def disable_attention_slicing(self) -> None:
        """Has no effect: attention is not sliced."""

    def enable_xformers_memory_efficient_attention(self, attention_op: Any = None) -> None:  # noqa: ANN401
        """Has no effect: see `ATTENTION`."""
        say_once(f"enable_xformers_memory_efficient_attention has no effect: {ATTENTION}")

    def disable_xformers_memory_efficient_attention(self) -> None:
        """Has no effect: xformers is not used."""

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: torch.device | str | None = None) -> Self:
        """Move all networks to the accelerator and leave them there.

        Args:
            gpu_id: index of the GPU.
            device: the device; None: the available accelerator, else the CPU.
        """
        found = torch.device(device or torch.accelerator.current_accelerator(check_available=True) or "cpu")
        found = found if gpu_id is None or found.type == "cpu" else torch.device(found.type, gpu_id)
        size = sum(value.nbytes for part in self.networks.values() for value in part.parameters()) / 1e9
        advice = "enable_vae_slicing() and enable_vae_tiling() save what decoding takes"
        say_once(f"nothing is offloaded: the networks, {size:.1f} GB, stay on {found}; {advice}")
        return self.to(found)

    enable_sequential_cpu_offload = enable_model_cpu_offload

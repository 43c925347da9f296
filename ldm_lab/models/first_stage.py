"""What the autoencoders of both kinds have in common: the first stage, as diffusion and sampling see it."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from ldm_lab.interop import compvis
from ldm_lab.models.arguments import (
    require,
    require_bool,
    require_positive,
    require_sample_size,
    require_scale,
    require_widths,
)
from ldm_lab.models.decoder import Decoder
from ldm_lab.models.encoder import Encoder
from ldm_lab.models.outputs import DecoderOutput
from ldm_lab.serialization import LoadError, PretrainedModel
from ldm_lab.untrusted import MAX_LAYERS

# Of either kind.
_SWITCHES = (
    "force_upcast", "lookup_from_codebook", "mid_block_add_attention", "use_quant_conv", "use_post_quant_conv",
)  # fmt: skip


class FirstStage(PretrainedModel):
    """Base of `VQModel` and `AutoencoderKL`: stage 1 of latent diffusion (Rombach et al. 2022, section 3.1).

    Images are `(B, 3, H, W)` in [-1, 1], H and W multiples of f = `downsample_factor`. Latents are
    `(B, embed_dim, H/f, W/f)`, unscaled: diffusion runs on `config.scaling_factor * latents`, and whoever
    decodes divides first.

    Attributes:
        draws_latents: whether latents are drawn from a distribution, so that `latents` takes noise.
    """

    draws_latents: ClassVar[bool]

    @property
    def embed_dim(self) -> int:
        """Channels of the latents."""
        raise NotImplementedError

    @property
    def downsample_factor(self) -> int:
        """Pixels of an image per position of its latents, along one side."""
        return 2 ** (len(self.config.block_out_channels) - 1)

    def latents(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Images `(B, 3, H, W)` in [-1, 1] -> unscaled latents `(B, embed_dim, H/f, W/f)`, as diffusion learns them.

        Args:
            images: what is encoded.
            noise: standard normal, in the shape of the latents, where latents are drawn; None takes their mode.

        Raises:
            ValueError: the images do not fit, or noise for latents that are not drawn.
        """
        raise NotImplementedError

    def decode(self, z: Tensor) -> DecoderOutput:
        """Unscaled latents `(B, embed_dim, h, w)` -> `.sample` `(B, 3, f*h, f*w)`, about in [-1, 1]."""
        raise NotImplementedError

    @classmethod
    def from_single_file(
        cls,
        path: str | Path,
        original_config: str | Path | None = None,
        torch_dtype: torch.dtype | None = None,
    ) -> Self:
        """Load a checkpoint of CompVis/latent-diffusion, of a first stage alone or with a UNet, in evaluation mode.

        Args:
            path: the file, `model.ckpt`.
            original_config: its YAML file; None takes the one beside it, else what the tensors tell.
            torch_dtype: floating-point type of the weights; None keeps that of the file.

        Raises:
            LoadError: a file is missing or damaged, holds another kind of first stage, or a tensor is missing or left
                over; one line says which.
        """
        config, tensors = compvis.read_first_stage(path, original_config)
        if config["_class_name"] != cls.__name__:
            raise LoadError(f"{path}: holds a first stage of class {config['_class_name']}, not {cls.__name__}")
        return cls.from_tensors(config, tensors, origin=str(path)).to(dtype=torch_dtype)

    def _check_arguments(self) -> None:
        config = self.config
        require("act_fn", config.act_fn, "silu")
        require_positive(**{key: config[key] for key in ("in_channels", "out_channels", "latent_channels")})
        require_positive(MAX_LAYERS, layers_per_block=config.layers_per_block)
        require_sample_size(config.sample_size)
        require_scale(config.scaling_factor)
        require_bool(**{key: config[key] for key in _SWITCHES if key in config})
        types = {key: config[key] for key in ("down_block_types", "up_block_types")}
        require_widths(config.block_out_channels, config.norm_num_groups, **types)

    def _make_encoder(self, out_channels: int) -> Encoder:
        return Encoder(self.config.in_channels, out_channels, self.config.down_block_types, *self._shared())

    def _make_decoder(self) -> Decoder:
        config = self.config
        return Decoder(config.latent_channels, config.out_channels, config.up_block_types, *self._shared())

    def _shared(self) -> tuple:
        keys = ("block_out_channels", "layers_per_block", "norm_num_groups", "mid_block_add_attention")
        return tuple(self.config[key] for key in keys)

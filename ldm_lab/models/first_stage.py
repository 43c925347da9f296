"""What the autoencoders of both kinds have in common: the first stage, as diffusion and sampling see it."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from ldm_lab.models.arguments import require, require_positive, require_widths
from ldm_lab.models.decoder import Decoder
from ldm_lab.models.encoder import Encoder
from ldm_lab.models.outputs import DecoderOutput
from ldm_lab.serialization import PretrainedModel


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

    def _check_arguments(self) -> None:
        config = self.config
        require("act_fn", config.act_fn, "silu")
        keys = ("in_channels", "out_channels", "layers_per_block", "latent_channels")
        require_positive(**{key: config[key] for key in keys})
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

"""KL autoencoder: stage 1 of latent diffusion with Gaussian latents (Rombach et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from ldm_lab.models.first_stage import FirstStage
from ldm_lab.models.layout import LaidOut
from ldm_lab.models.outputs import AutoencoderKLOutput, DecoderOutput, DiagonalGaussian
from ldm_lab.models.pretrained import register_to_config
from ldm_lab.utils.arguments import require_choice, require_input


class AutoencoderKL(LaidOut, FirstStage):
    """Encoder, Gaussian posterior and decoder, with the arguments and state dict of `diffusers.AutoencoderKL`.

    Diffusion trains on latents drawn from the posterior of an image; a weak KL term in the autoencoder's training
    keeps them near the standard normal (Rombach et al. 2022, arXiv 2112.10752, section 3.1).

    Arguments that are not listed here: see `FirstStage`.

    Args:
        latent_channels: channels of the latents.
        scaling_factor: factor by which diffusion multiplies the latents. The default is Stable Diffusion's.
        shift_factor: only None is supported.
        latents_mean: only None is supported.
        latents_std: only None is supported.
        force_upcast: has no effect here; diffusers' pipelines read it in float16.
        use_quant_conv: whether a 1x1 convolution follows the encoder.
        use_post_quant_conv: whether a 1x1 convolution precedes the decoder.

    Raises:
        UserError: a value is invalid or not supported.
    """

    draws_latents: ClassVar[bool] = True

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        down_block_types: Sequence[str] = ("DownEncoderBlock2D",),
        up_block_types: Sequence[str] = ("UpDecoderBlock2D",),
        block_out_channels: Sequence[int] = (64,),
        layers_per_block: int = 1,
        act_fn: str = "silu",
        latent_channels: int = 4,
        norm_num_groups: int = 32,
        sample_size: int | Sequence[int] = 32,
        scaling_factor: float = 0.18215,
        shift_factor: float | None = None,
        latents_mean: Sequence[float] | None = None,
        latents_std: Sequence[float] | None = None,
        force_upcast: bool = True,
        use_quant_conv: bool = True,
        use_post_quant_conv: bool = True,
        mid_block_add_attention: bool = True,
    ) -> None:
        super().__init__()
        self._check_arguments()
        for key in ("shift_factor", "latents_mean", "latents_std"):
            require_choice(key, self.config[key], [None])

        moments = 2 * latent_channels  # mean and log variance
        self.encoder = self._make_encoder(moments)
        self.decoder = self._make_decoder()
        self.quant_conv = nn.Conv2d(moments, moments, 1) if use_quant_conv else nn.Identity()
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1) if use_post_quant_conv else nn.Identity()
        self.lay_out()

    @property
    def embed_dim(self) -> int:
        """Channels of the latents."""
        return self.config.latent_channels

    def moments(self, images: Tensor) -> Tensor:
        """Images `(B, in_channels, H, W)` in [-1, 1] -> means, then clamped log variances.

        `(B, 2 * embed_dim, H/f, W/f)`.
        """
        posterior = self.encode(images).latent_dist
        return torch.cat([posterior.mean, posterior.logvar], dim=1)

    def from_moments(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """`(B, 2 * embed_dim, h, w)` -> latents `(B, embed_dim, h, w)`, not scaled: mean + std * noise.

        `noise` is standard normal, in the shape of the latents; None returns the mean.
        """
        posterior = DiagonalGaussian(moments)
        return posterior.mode() if noise is None else posterior.from_noise(noise)

    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[DiagonalGaussian]:
        """Images `(B, in_channels, H, W)` -> `.latent_dist` over `(B, latent_channels, H/f, W/f)`, not scaled.

        Raises:
            UserError: wrong number of channels, or a side that is not a multiple of `downsample_factor`.
        """
        require_input(x.shape, self.config.in_channels, self.downsample_factor, "AutoencoderKL.encode")
        posterior = DiagonalGaussian(self.quant_conv(self.encoder(x)))
        return AutoencoderKLOutput(posterior) if return_dict else (posterior,)

    def decode(
        self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """Latents `(B, latent_channels, h, w)`, not scaled -> `.sample` `(B, out_channels, f*h, f*w)`.

        Args:
            z: the latents.
            return_dict: False returns a tuple.
            generator: has no effect, as in diffusers.

        Raises:
            UserError: wrong number of channels.
        """
        require_input(z.shape, self.embed_dim, 1, "AutoencoderKL.decode")
        sample = self.to_pixels(self.post_quant_conv(z))
        return DecoderOutput(sample) if return_dict else (sample,)

    def forward(
        self,
        sample: Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput | tuple[Tensor]:
        """Images -> reconstructions `.sample` of the same shape, from the mean of the latents or a draw.

        Args:
            sample: the images.
            sample_posterior: decode latents drawn with `generator` instead of the mean.
            return_dict: False returns a tuple.
            generator: generator of the draw.
        """
        posterior = self.encode(sample).latent_dist
        latents = posterior.sample(generator) if sample_posterior else posterior.mode()
        return self.decode(latents, return_dict=return_dict)

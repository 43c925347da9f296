"""VQ autoencoder: stage 1 of latent diffusion with a codebook (Rombach et al. 2022, arXiv 2112.10752)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from ldm_lab.models.first_stage import FirstStage
from ldm_lab.models.layout import LaidOut
from ldm_lab.models.outputs import DecoderOutput, EncoderOutput
from ldm_lab.models.pretrained import register_to_config
from ldm_lab.models.quantizer import VectorQuantizer
from ldm_lab.utils.arguments import require_choice, require_input, require_positive
from ldm_lab.utils.errors import UserError
from ldm_lab.utils.reading import MAX_CODES


class VQModel(LaidOut, FirstStage):
    """Encoder, codebook and decoder, with the arguments and state dict of `diffusers.VQModel`.

    Images are `(B, in_channels, H, W)` in [-1, 1], H and W multiples of `downsample_factor`. Latents are the
    output of the encoder *before* quantization, `(B, vq_embed_dim, H/f, W/f)`, unscaled: diffusion runs on
    `config.scaling_factor * latents`, so divide by the factor before decoding.

    Arguments that are not listed here: see `FirstStage`.

    Args:
        latent_channels: channels between the encoder and `quant_conv`.
        num_vq_embeddings: number of codes.
        vq_embed_dim: length of a code; None means `latent_channels`.
        scaling_factor: factor by which diffusion multiplies the latents.
        norm_type: only `group` is supported.
        lookup_from_codebook: whether `decode(..., force_not_quantize=True)` takes code indices.
        force_upcast: has no effect, as in diffusers.

    Raises:
        UserError: a value is invalid or not supported.
    """

    draws_latents: ClassVar[bool] = False

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
        latent_channels: int = 3,
        sample_size: int = 32,
        num_vq_embeddings: int = 256,
        norm_num_groups: int = 32,
        vq_embed_dim: int | None = None,
        # diffusers' default is 0.18215, which was measured for Stable Diffusion's KL autoencoder. Published VQ folders
        # omit the key, and their diffusion models were trained without scaling.
        scaling_factor: float = 1.0,
        norm_type: str = "group",
        mid_block_add_attention: bool = True,
        lookup_from_codebook: bool = False,
        force_upcast: bool = False,
    ) -> None:
        super().__init__()
        self._check_arguments()
        require_choice("norm_type", norm_type, ["group"])
        vq_embed_dim = latent_channels if vq_embed_dim is None else vq_embed_dim
        require_positive(MAX_CODES, num_vq_embeddings=num_vq_embeddings)
        require_positive(vq_embed_dim=vq_embed_dim)

        self.encoder = self._make_encoder(latent_channels)
        self.quant_conv = nn.Conv2d(latent_channels, vq_embed_dim, 1)
        self.quantize = VectorQuantizer(num_vq_embeddings, vq_embed_dim)
        self.post_quant_conv = nn.Conv2d(vq_embed_dim, latent_channels, 1)
        self.decoder = self._make_decoder()
        self.lay_out()

    @property
    def embed_dim(self) -> int:
        """Channels of the latents: the length of a code."""
        return self.quantize.vq_embed_dim

    def moments(self, images: Tensor) -> Tensor:
        """`(B, in_channels, H, W)` in [-1, 1] -> latents `(B, embed_dim, H/f, W/f)`, not quantized, not scaled."""
        return self.encode(images).latents

    def from_moments(self, moments: Tensor, noise: None = None) -> Tensor:
        """The latents, unchanged. Raises `UserError` if noise is given."""
        if noise is not None:
            raise UserError("noise was given, but the latents of a VQModel are not drawn")
        return moments

    def encode(self, x: Tensor, return_dict: bool = True) -> EncoderOutput | tuple[Tensor]:
        """Images `(B, in_channels, H, W)` -> `.latents` `(B, vq_embed_dim, H/f, W/f)`, not quantized, not scaled.

        Raises:
            UserError: wrong number of channels, or a side that is not a multiple of `downsample_factor`.
        """
        require_input(x.shape, self.config.in_channels, self.downsample_factor, "VQModel.encode")
        latents = self.quant_conv(self.encoder(x))
        return EncoderOutput(latents) if return_dict else (latents,)

    def decode(
        self,
        h: Tensor,
        force_not_quantize: bool = False,
        return_dict: bool = True,
        shape: Sequence[int] | None = None,
    ) -> DecoderOutput | tuple[Tensor, Tensor]:
        """Latents `(B, vq_embed_dim, h, w)`, not scaled -> `.sample` `(B, out_channels, f*h, f*w)` and `.commit_loss`.

        Args:
            h: the latents; they are quantized first.
            force_not_quantize: decode `h` without quantization; with `config.lookup_from_codebook`, `h` holds indices.
            return_dict: False returns `(sample, commit_loss)`.
            shape: `(B, h, w, vq_embed_dim)`, for code indices.

        Raises:
            UserError: wrong number of channels.
        """
        if force_not_quantize and self.config.lookup_from_codebook:
            h = self.quantize.get_codebook_entry(h, shape)
        require_input(h.shape, self.embed_dim, 1, "VQModel.decode")
        if force_not_quantize:
            quantized, loss = h, h.new_zeros(())
        else:
            quantized, loss, _ = self.quantize(h)
        sample = self.to_pixels(self.post_quant_conv(quantized))
        return DecoderOutput(sample, loss) if return_dict else (sample, loss)

    def forward(self, sample: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor, Tensor]:
        """Images -> reconstructions `.sample` of the same shape, and `.commit_loss`."""
        return self.decode(self.encode(sample).latents, return_dict=return_dict)

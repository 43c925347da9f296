"""Base class of first stages (autoencoders): the interface for diffusion and sampling."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from ldm_lab.checkpoints import compvis
from ldm_lab.checkpoints.checkpoint import fingerprint
from ldm_lab.models.encoder_decoder import Decoder, Encoder
from ldm_lab.models.layers.recomputed import GradientCheckpointing
from ldm_lab.models.outputs import DecoderOutput
from ldm_lab.models.pretrained import PretrainedModel, floating_type
from ldm_lab.models.tiling import Tiles
from ldm_lab.utils import shell
from ldm_lab.utils.arguments import require_architecture, require_bool, require_choice, require_positive, require_scale
from ldm_lab.utils.pixels import RGB_8_BIT, PixelFormat
from ldm_lab.utils.reading import LoadError

VALUE_RANGE = "_value_range"  # entry of a config's file; none for images of 8 bits
DECODER = ("post_quant_conv", "decoder")  # submodules that map latents to images

# Arguments of both kinds.
_SWITCHES = (
    "force_upcast", "lookup_from_codebook", "mid_block_add_attention", "use_quant_conv", "use_post_quant_conv",
)  # fmt: skip


class FirstStage(GradientCheckpointing, PretrainedModel):
    """Base of `VQModel` and `AutoencoderKL`: stage 1 of latent diffusion (Rombach et al. 2022, section 3.1).

    Images are `(B, in_channels, H, W)` in [-1, 1], H and W multiples of f = `downsample_factor`. Latents are
    `(B, embed_dim, H/f, W/f)`, unscaled: diffusion runs on `config.scaling_factor * latents`, so divide by
    the factor before decoding.

    Args:
        in_channels: channels of the image.
        out_channels: channels of the reconstruction.
        down_block_types: `DownEncoderBlock2D` or `AttnDownEncoderBlock2D` per resolution, highest first.
        up_block_types: `UpDecoderBlock2D` or `AttnUpDecoderBlock2D` per resolution, lowest first.
        block_out_channels: width per resolution, highest first; f is 2^(their number - 1).
        layers_per_block: residual blocks per resolution (the decoder has one more).
        act_fn: only `silu` is supported.
        norm_num_groups: groups of every normalisation.
        sample_size: resolution of the training images; information only.
        mid_block_add_attention: whether the middle blocks have attention (one head).

    Attributes:
        value_range: values (low, high) of the images' own data that are -1 and 1 here; files keep it.
        draws_latents: whether latents are drawn from a posterior, so that `latents` takes noise.
        tiles: settings of tiled decoding; None: no tiling. See `enable_tiling`.
        slicing: whether the images of a batch are decoded one by one.
    """

    draws_latents: ClassVar[bool]
    value_range: tuple[float, float] = RGB_8_BIT.value_range
    tiles: Tiles | None = None
    slicing: bool = False

    @property
    def embed_dim(self) -> int:
        """Channels of the latents."""
        raise NotImplementedError

    @property
    def pixels(self) -> PixelFormat:
        """Channels and range of the images that it makes."""
        return PixelFormat(self.config.out_channels, self.value_range)

    def beside_config(self) -> dict[str, Any]:
        """The range of the images, unless it is that of 8 bits."""
        return {} if self.pixels.is_8_bit else {VALUE_RANGE: list(self.value_range)}

    @classmethod
    def from_config(cls, config: dict[str, Any], **overrides: Any) -> Self:  # noqa: ANN401
        """See `Configurable.from_config`. Raises `LoadError` for an entry that is no range of values."""
        made, limits = super().from_config(config, **overrides), config.get(VALUE_RANGE)
        if limits is not None:
            if not isinstance(limits, list) or [type(end) in (int, float) for end in limits] != [True, True]:
                raise LoadError(f"{VALUE_RANGE} is {limits!r}: not two numbers")
            made.value_range = PixelFormat(value_range=(float(limits[0]), float(limits[1]))).value_range
        return made

    @property
    def downsample_factor(self) -> int:
        """Pixels of an image per position of its latents, along one side."""
        return 2 ** (len(self.config.block_out_channels) - 1)

    @property
    def encoding(self) -> str:
        """Fingerprint of the weights that determine the latents; excludes the decoder, which may be trained further."""
        return fingerprint(nn.ModuleDict({name: part for name, part in self.named_children() if name not in DECODER}))

    def latents(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Images `(B, in_channels, H, W)` in [-1, 1] -> unscaled latents `(B, embed_dim, H/f, W/f)` for diffusion.

        Args:
            images: images to encode.
            noise: standard normal, in the shape of the latents, if latents are drawn; None: their mode.

        Raises:
            UserError: the images do not fit, or noise is given but latents are not drawn.
        """
        return self.from_moments(self.moments(images), noise)

    def moments(self, images: Tensor) -> Tensor:
        """Images `(B, in_channels, H, W)` in [-1, 1] -> deterministic moments of their latents, `(B, M, H/f, W/f)`.

        If latents are drawn, these are means and log variances (M = 2 * embed_dim); else the latents themselves.
        They can be cached: `latents(images, noise)` is `from_moments(moments(images), noise)`.
        """
        raise NotImplementedError

    def from_moments(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """Moments `(B, M, h, w)` -> unscaled latents `(B, embed_dim, h, w)`; for the noise see `latents`."""
        raise NotImplementedError

    def decode(self, z: Tensor) -> DecoderOutput:
        """Unscaled latents `(B, embed_dim, h, w)` -> `.sample` `(B, out_channels, f*h, f*w)`, about in [-1, 1]."""
        raise NotImplementedError

    def to_pixels(self, z: Tensor) -> Tensor:
        """Run the decoder on `(B, latent_channels, h, w)`, with slicing and tiling if enabled."""
        if self.slicing and len(z) > 1:
            return torch.cat([self._tiled(part) for part in z.split(1)])  # (1, C, f*h, f*w) each
        return self._tiled(z)

    def _tiled(self, z: Tensor) -> Tensor:
        return self.decoder(z) if self.tiles is None else self.tiles.decode(self.decoder, z, self.downsample_factor)

    def enable_tiling(self, size: int = 64, overlap: int = 16) -> None:
        """Decode latents larger than `size` in tiles of that size, with the memory of one tile.

        Args:
            size: latent positions along one side of a tile.
            overlap: latent positions over which neighbouring tiles are blended.

        Raises:
            UserError: the overlap is negative, or more than half of the size.
        """
        self.tiles = Tiles(size, overlap)

    def disable_tiling(self) -> None:
        """Decode images of any size at once (the default)."""
        self.tiles = None

    def enable_slicing(self) -> None:
        """Decode the images of a batch one by one, with the memory of one image."""
        self.slicing = True

    def disable_slicing(self) -> None:
        """Decode a whole batch at once (the default)."""
        self.slicing = False

    @classmethod
    def from_single_file(
        cls,
        path: str | Path,
        original_config: str | Path | None = None,
        torch_dtype: torch.dtype | str | None = None,
    ) -> Self:
        """Load a checkpoint of CompVis/latent-diffusion, of a first stage alone or with a UNet, in evaluation mode.

        Args:
            path: the file, `model.ckpt`.
            original_config: its YAML file; None: the YAML file beside it, else inferred from the tensors.
            torch_dtype: dtype of the weights; None keeps the dtype of the file.

        Raises:
            LoadError: a file is missing or corrupt, holds another kind of first stage, or a tensor is missing or
                surplus; the one-line message names it.
        """
        path = shell.path(path)
        config, tensors = compvis.read_first_stage(path, original_config)
        if config["_class_name"] != cls.__name__:
            raise LoadError(f"{path}: holds a first stage of class {config['_class_name']}, not {cls.__name__}")
        return cls.from_tensors(config, tensors, origin=str(path)).to(dtype=floating_type(torch_dtype))

    def _check_arguments(self) -> None:
        config = self.config
        require_choice("act_fn", config.act_fn, ["silu"])
        require_architecture(config)
        require_positive(latent_channels=config.latent_channels)
        require_scale(config.scaling_factor)
        require_bool(**{key: config[key] for key in _SWITCHES if key in config})

    def _make_encoder(self, out_channels: int) -> Encoder:
        return Encoder(self.config.in_channels, out_channels, self.config.down_block_types, *self._shared())

    def _make_decoder(self) -> Decoder:
        config = self.config
        return Decoder(config.latent_channels, config.out_channels, config.up_block_types, *self._shared())

    def _shared(self) -> tuple:
        keys = ("block_out_channels", "layers_per_block", "norm_num_groups", "mid_block_add_attention")
        return tuple(self.config[key] for key in keys)

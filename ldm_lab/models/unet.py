"""The UNet: denoising network of stage 2 of latent diffusion (Rombach et al. 2022, arXiv 2112.10752)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_lab.models.layers.attention import AttentionBlock
from ldm_lab.models.layers.blocks import MakeLayer, MidBlock, down_path, up_path
from ldm_lab.models.layers.embedding import FourierFeatures, TimestepEmbedding, sinusoid
from ldm_lab.models.layers.recomputed import GradientCheckpointing
from ldm_lab.models.layers.resample import Downsample, Upsample
from ldm_lab.models.layers.resnet import ResnetBlock
from ldm_lab.models.layout import LaidOut
from ldm_lab.models.outputs import UNet2DOutput
from ldm_lab.models.pretrained import PretrainedModel, register_to_config
from ldm_lab.utils.arguments import (
    by_block,
    require_architecture,
    require_bool,
    require_choice,
    require_divides,
    require_input,
    require_number,
    require_positive,
)
from ldm_lab.utils.errors import UserError

DEFAULT_HEAD_DIM = 8  # diffusers' default


class UNet2DModel(LaidOut, GradientCheckpointing, PretrainedModel):
    """A UNet with a timestep input, with the arguments and state dict of `diffusers.UNet2DModel`.

    The last argument is our addition: diffusers does not support an equal number of heads at every width. A
    folder of such a network names our class, so diffusers refuses to load it.

    Args:
        sample_size: resolution of its input, an integer or (height, width); information only.
        in_channels: channels of the input.
        out_channels: channels of the prediction.
        center_input_sample: whether the input is in [0, 1] and is mapped to [-1, 1].
        time_embedding_type: `positional`, or `fourier`: random frequencies of the logarithm of a noise level above 0;
            the output is then divided by the noise level.
        time_embedding_dim: length of the time embedding; None: four times the first width.
        freq_shift: see `layers.embedding.sinusoid`.
        flip_sin_to_cos: see `layers.embedding.sinusoid`.
        down_block_types: per resolution, highest first: `DownBlock2D`, `AttnDownBlock2D`, or
            `ResnetDownsampleBlock2D`, which has no attention and downsamples by a residual block.
        mid_block_type: `UNetMidBlock2D`, or None for no middle block.
        up_block_types: per resolution, lowest first: `UpBlock2D`, `AttnUpBlock2D` or `ResnetUpsampleBlock2D`.
        block_out_channels: width per resolution, highest first.
        layers_per_block: residual blocks per resolution on the way down; one more on the way up.
        mid_block_scale_factor: only 1 is supported.
        downsample_padding: 1, or 0 for the asymmetric padding of autoencoders.
        downsample_type: downsampling of an `AttnDownBlock2D` (other block types imply theirs): `conv`, a
            convolution of stride 2, or `resnet`, a residual block with average pooling.
        upsample_type: upsampling of an `AttnUpBlock2D`: `conv`, or `resnet`, a residual block that repeats pixels.
        dropout: dropout probability in every residual block.
        act_fn: only `silu` is supported.
        attention_head_dim: channels of one attention head, see `layers.attention.AttentionBlock`; None: one head.
            It has no effect with `num_attention_heads`.
        norm_num_groups: groups of every normalisation.
        attn_norm_num_groups: groups of the middle attention's normalisation; None: `norm_num_groups`, but with
            `scale_shift` no normalisation, as in diffusers.
        norm_eps: added to the variance by every normalisation.
        resnet_time_scale_shift: `default` adds the time embedding, `scale_shift` scales and shifts by it; see
            `layers.resnet.ResnetBlock`.
        add_attention: whether the middle block has attention.
        class_embed_type: only None is supported.
        num_class_embeds: only None is supported.
        num_train_timesteps: has no effect with positional embeddings, as in diffusers.
        num_attention_heads: number of heads at every width, instead of `attention_head_dim`; None: use
            `attention_head_dim`.

    Raises:
        UserError: a value is invalid or not supported.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int | Sequence[int] | None = None,
        in_channels: int = 3,
        out_channels: int = 3,
        center_input_sample: bool = False,
        time_embedding_type: str = "positional",
        time_embedding_dim: int | None = None,
        freq_shift: int = 0,
        flip_sin_to_cos: bool = True,
        down_block_types: Sequence[str] = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        mid_block_type: str | None = "UNetMidBlock2D",
        up_block_types: Sequence[str] = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        block_out_channels: Sequence[int] = (224, 448, 672, 896),
        layers_per_block: int = 2,
        mid_block_scale_factor: float = 1,
        downsample_padding: int = 1,
        downsample_type: str = "conv",
        upsample_type: str = "conv",
        dropout: float = 0.0,
        act_fn: str = "silu",
        attention_head_dim: int | None = DEFAULT_HEAD_DIM,
        norm_num_groups: int = 32,
        attn_norm_num_groups: int | None = None,
        norm_eps: float = 1e-5,
        resnet_time_scale_shift: str = "default",
        add_attention: bool = True,
        class_embed_type: str | None = None,
        num_class_embeds: int | None = None,
        num_train_timesteps: int | None = None,
        num_attention_heads: int | None = None,
    ) -> None:
        super().__init__()
        self._check_arguments()
        widths = list(block_out_channels)
        time_channels = 4 * widths[0] if time_embedding_dim is None else time_embedding_dim
        resnet, attention, mid_attention = self._layers(time_channels)

        fourier = time_embedding_type == "fourier"
        sines = partial(sinusoid, dim=widths[0], flip_sin_to_cos=flip_sin_to_cos, freq_shift=freq_shift)
        self.time_proj = FourierFeatures(widths[0]) if fourier else sines
        self.time_embedding = TimestepEmbedding(widths[0] * (1 + fourier), time_channels)
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.down_blocks = self._down_blocks(resnet, attention)
        self.mid_block = MidBlock(widths[-1], resnet, mid_attention) if mid_block_type else None
        self.up_blocks = self._up_blocks(resnet, attention)
        self.conv_norm_out = nn.GroupNorm(norm_num_groups, widths[0], norm_eps)
        self.conv_out = nn.Conv2d(widths[0], out_channels, 3, padding=1)
        self.lay_out()

    @property
    def library(self) -> str:
        """`ldm_lab` with a fixed number of heads, which diffusers does not support, else as the base class."""
        library, heads = super().library, self.config.num_attention_heads
        return "ldm_lab" if library == "diffusers" and heads is not None else library

    def to_json(self) -> dict[str, Any]:
        """The config, without `num_attention_heads` if it is None, as diffusers would warn of the key."""
        return {key: value for key, value in super().to_json().items() if (key, value) != ("num_attention_heads", None)}

    def _check_arguments(self) -> None:
        config = self.config
        for key, supported in _SUPPORTED.items():
            require_choice(key, config[key], supported)
        require_architecture(config)
        optional = ("time_embedding_dim", "attention_head_dim", "attn_norm_num_groups", "num_attention_heads")
        require_positive(**{key: config[key] for key in optional if config[key] is not None})
        if config.num_attention_heads is not None and config.attention_head_dim not in (None, DEFAULT_HEAD_DIM):
            both = f"num_attention_heads={config.num_attention_heads}, attention_head_dim={config.attention_head_dim}"
            raise UserError(f"{both}: only one of them can be given; set the other to null")
        require_divides("attn_norm_num_groups", config.attn_norm_num_groups or 1, config.block_out_channels[-1])
        require_bool(**{key: config[key] for key in ("add_attention", "center_input_sample", "flip_sin_to_cos")})
        require_number(0, 1, dropout=config.dropout)
        require_number(1e-12, 1, norm_eps=config.norm_eps)
        require_number(0, max(config.block_out_channels[0] // 2, 1), freq_shift=config.freq_shift)

    def _layers(self, time_channels: int) -> tuple[partial, partial, MakeLayer]:
        """Constructors of residual blocks, attention and the middle's attention that lack the numbers of channels."""
        config = self.config
        norm = {"groups": config.norm_num_groups, "eps": config.norm_eps}
        scale_shift = config.resnet_time_scale_shift == "scale_shift"
        time = {"time_channels": time_channels, "scale_shift": scale_shift}
        fixed = {"num_heads": config.num_attention_heads} if config.num_attention_heads else None
        attention = partial(AttentionBlock, **norm, **(fixed or {"dim_head": config.attention_head_dim}))
        mid_groups = config.attn_norm_num_groups or (None if scale_shift else config.norm_num_groups)
        mid_attention = partial(attention, groups=mid_groups) if config.add_attention else nn.Identity
        return partial(ResnetBlock, **norm, **time, dropout=config.dropout), attention, mid_attention

    def _down_blocks(self, resnet: partial, attention: partial) -> nn.ModuleList:
        config = self.config
        downsample = {
            "conv": partial(Downsample, padding=config.downsample_padding),
            "resnet": partial(resnet, resample=nn.AvgPool2d(2)),
        }
        kinds = by_block("down_block_types", config.down_block_types, _DOWN_BLOCKS)
        attentions = [attention if attended else nn.Identity for attended, _ in kinds]
        downsamples = [downsample[sampling or config.downsample_type] for _, sampling in kinds]
        return down_path(config.block_out_channels, config.layers_per_block, resnet, attentions, downsamples)

    def _up_blocks(self, resnet: partial, attention: partial) -> nn.ModuleList:
        config = self.config
        upsample = {
            "conv": Upsample,
            "resnet": partial(resnet, resample=nn.Upsample(scale_factor=2.0, mode="nearest")),
        }
        kinds = by_block("up_block_types", config.up_block_types, _UP_BLOCKS)
        attentions = [attention if attended else nn.Identity for attended, _ in kinds]
        upsamples = [upsample[sampling or config.upsample_type] for _, sampling in kinds]
        widths, per_block = config.block_out_channels, config.layers_per_block + 1
        # Skip connections: conv_in, then every residual block and every downsampler (the last level has none).
        made = [widths[0], *(width for width in widths for _ in range(per_block))][:-1]
        skips = [[made.pop() for _ in range(per_block)] for _ in widths]
        return up_path(widths[::-1], skips, resnet, attentions, upsamples)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[Tensor]:
        """Predict noise, clean latents or velocity, as the network was trained.

        Args:
            sample: noisy input `(B, in_channels, H, W)`; H and W multiples of 2^(number of resolutions - 1).
            timestep: timestep of the training schedule: a number, a 0-dim tensor, or one per sample `(B,)`.
            class_labels: must be None.
            return_dict: False returns a tuple.

        Returns:
            `.sample` `(B, out_channels, H, W)`.

        Raises:
            UserError: class labels, or a shape that does not fit.
        """
        if class_labels is not None:
            raise UserError("class_labels were given, but this UNet2DModel is unconditional")
        require_input(sample.shape, self.config.in_channels, self.downsample_factor, "UNet2DModel")
        timesteps = self._timesteps(timestep, sample)
        time_embedding = self.time_embedding(self.time_proj(timesteps).to(self.dtype))

        x = self.conv_in(2 * sample - 1 if self.config.center_input_sample else sample)
        skips = [x]
        for block in self.down_blocks:
            x = block(x, time_embedding, skips)
        if self.mid_block is not None:
            x = self.mid_block(x, time_embedding)
        for block in self.up_blocks:
            x = block(x, time_embedding, skips)
        x = self.conv_out(F.silu(self.conv_norm_out(x)))
        if self.config.time_embedding_type == "fourier":
            x = (x / timesteps[:, None, None, None]).to(x.dtype)
        return UNet2DOutput(x) if return_dict else (x,)

    @property
    def downsample_factor(self) -> int:
        """Height and width of the input must be multiples of this factor."""
        return 2 ** (len(self.down_blocks) - 1)

    @torch.no_grad()
    def zero_residuals(self) -> None:
        """Initialise every residual branch and the output with zeros, for training from scratch (as CompVis).

        The constructor does not do this, as a network with constant zero output is only useful for training.
        """
        last = [self.conv_out]
        for module in self.modules():
            if isinstance(module, ResnetBlock):
                last.append(module.conv2)
            elif isinstance(module, AttentionBlock):
                last.append(module.to_out[0])
        for layer in last:
            layer.weight.zero_()
            layer.bias.zero_()

    @staticmethod
    def _timesteps(timestep: Tensor | float, sample: Tensor) -> Tensor:
        """A number or `(B,)` -> `(B,)`."""
        if not isinstance(timestep, Tensor):
            timestep = torch.full((), timestep, device=sample.device)
        if timestep.shape not in ((), (1,), sample.shape[:1]):
            raise UserError(f"timestep has shape {tuple(timestep.shape)}, the batch has {len(sample)} samples")
        return timestep.to(sample.device).expand(len(sample))


# Arguments of diffusers' class, with the values that this architecture supports.
_SUPPORTED = {
    "time_embedding_type": ("positional", "fourier"),
    "mid_block_type": ("UNetMidBlock2D", None),
    "mid_block_scale_factor": (1,),
    "downsample_padding": (1, 0),
    "downsample_type": ("conv", "resnet"),
    "upsample_type": ("conv", "resnet"),
    "act_fn": ("silu",),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
}

# Block type -> whether it has attention, and its resampling; None: `downsample_type` or `upsample_type`. As in
# diffusers, these arguments have no effect on plain blocks.
_DOWN_BLOCKS = {
    "DownBlock2D": (False, "conv"),
    "AttnDownBlock2D": (True, None),
    "ResnetDownsampleBlock2D": (False, "resnet"),
}
_UP_BLOCKS = {
    "UpBlock2D": (False, "conv"),
    "AttnUpBlock2D": (True, None),
    "ResnetUpsampleBlock2D": (False, "resnet"),
}

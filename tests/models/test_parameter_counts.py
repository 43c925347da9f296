"""The published sizes (Rombach et al. 2022 and its repository), on the meta device: no memory is taken."""

import torch

from ldm_lab.models.kl_model import AutoencoderKL
from ldm_lab.models.unet import UNet2DModel
from ldm_lab.models.vq_model import VQModel


def count(kind, **arguments):
    with torch.device("meta"):
        return kind(**arguments).num_parameters()


def autoencoder(kind, levels, attention=(), **arguments):
    down = [f"{'Attn' if level in attention else ''}DownEncoderBlock2D" for level in range(levels)]
    up = [f"{'Attn' if level in attention else ''}UpDecoderBlock2D" for level in reversed(range(levels))]
    return count(kind, down_block_types=down, up_block_types=up, layers_per_block=2, **arguments)


F4 = {"block_out_channels": [128, 256, 512], "num_vq_embeddings": 8192}
F8 = {"block_out_channels": [128, 256, 256, 512], "num_vq_embeddings": 16384, "latent_channels": 4}
# Heads, not their size, are the same at every width; the lowest level has no attention.
CHURCHES = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [192, 384, 384, 768, 768],
    "down_block_types": ["AttnDownBlock2D"] * 4 + ["ResnetDownsampleBlock2D"],
    "up_block_types": ["ResnetUpsampleBlock2D"] + ["AttnUpBlock2D"] * 4,
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "resnet_time_scale_shift": "scale_shift",
    "attn_norm_num_groups": 32,
    "num_attention_heads": 8,
}


def test_vq_f4():
    assert autoencoder(VQModel, 3, **F4) == 55_322_782


def test_vq_f4_without_attention():
    assert autoencoder(VQModel, 3, **F4, mid_block_add_attention=False) == 53_219_486


def test_vq_f8():
    assert autoencoder(VQModel, 4, attention=(3,), **F8) == 67_717_295


def test_kl_f4():
    assert autoencoder(AutoencoderKL, 3, block_out_channels=[128, 256, 512], latent_channels=3) == 55_312_063


def test_kl_f8():
    assert autoencoder(AutoencoderKL, 4, block_out_channels=[128, 256, 512, 512]) == 83_653_863


def test_unet_of_celebahq():
    assert count(UNet2DModel, sample_size=64, attention_head_dim=32) == 274_056_163


def test_unet_of_churches():
    assert count(UNet2DModel, sample_size=32, **CHURCHES) == 294_966_916

"""The published sizes (Rombach et al. 2022 and its repository), on the meta device: no memory is taken."""

import torch

from ldm_lab.models.unet import UNet2DModel
from ldm_lab.models.vq_model import VQModel


def count(kind, **arguments):
    with torch.device("meta"):
        return kind(**arguments).num_parameters()


def vq_model(levels, attention=(), **arguments):
    down = [f"{'Attn' if level in attention else ''}DownEncoderBlock2D" for level in range(levels)]
    up = [f"{'Attn' if level in attention else ''}UpDecoderBlock2D" for level in reversed(range(levels))]
    return count(VQModel, down_block_types=down, up_block_types=up, layers_per_block=2, **arguments)


F4 = {"block_out_channels": [128, 256, 512], "num_vq_embeddings": 8192}
F8 = {"block_out_channels": [128, 256, 256, 512], "num_vq_embeddings": 16384, "latent_channels": 4}


def test_vq_f4():
    assert vq_model(3, **F4) == 55_322_782


def test_vq_f4_without_attention():
    assert vq_model(3, **F4, mid_block_add_attention=False) == 53_219_486


def test_vq_f8():
    assert vq_model(4, attention=(3,), **F8) == 67_717_295


def test_unet_of_celebahq():
    assert count(UNet2DModel, sample_size=64, attention_head_dim=32) == 274_056_163

"""Channels lie innermost, in the weights and in every feature map: no layer turns one over for the next."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from ldm_lab import UNet2DModel, VQModel
from ldm_lab.models.discriminator import PatchDiscriminator
from ldm_lab.models.kl_model import AutoencoderKL
from ldm_lab.training.ema import EMA

CONV, ATTN, RES = "DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"
WIDTHS = {"block_out_channels": (8, 16, 24), "norm_num_groups": 4}
NETWORKS = {
    "unet": lambda: UNet2DModel(
        **WIDTHS, down_block_types=(RES, ATTN, CONV), attention_head_dim=4, layers_per_block=1,
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    ),
    "vq": lambda: VQModel(
        block_out_channels=(8, 16), norm_num_groups=4, num_vq_embeddings=8, latent_channels=3,
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
    ),
    "kl": lambda: AutoencoderKL(
        block_out_channels=(8, 16), norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    ),
    "discriminator": lambda: PatchDiscriminator(channels=8),
}  # fmt: skip


def channels_innermost(tensor):
    return tensor.is_contiguous(memory_format=torch.channels_last)


def run(network, images):
    """Once through, both ways for an autoencoder."""
    if isinstance(network, UNet2DModel):
        return network(images, 5).sample
    if isinstance(network, PatchDiscriminator):
        return network(images)
    return network.decode(network.from_moments(network.moments(images))).sample


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_no_layer_turns_a_feature_map_over(name, training):
    network = NETWORKS[name]().train(training)
    seen = []

    def look(layer, inputs, output):
        seen.append((layer, channels_innermost(inputs[0]), channels_innermost(output)))

    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.GroupNorm | nn.BatchNorm2d):
            module.register_forward_hook(look)
    # 3 channels of 40 x 40: past the size from which upsampling is one transposed convolution
    run(network, torch.rand(2, 3, 40, 40))
    assert len(seen) > 5
    assert all(output for _, _, output in seen)
    # Images and latents come as the caller has them.
    assert all(came or layer.weight.shape[1] <= 4 for layer, came, _ in seen)


@pytest.mark.parametrize("name", ["unet", "vq", "kl"])
def test_copies_and_loaded_networks_lie_alike(name, tmp_path):
    network = NETWORKS[name]().eval()
    network.save_pretrained(tmp_path)
    assert all(value.is_contiguous() for value in load_file(tmp_path / network.weights_name).values())
    images = torch.rand(2, 3, 40, 40)
    expected = run(network, images)
    for same in (type(network).from_pretrained(tmp_path), copy.deepcopy(network), EMA(network).model):
        assert all(channels_innermost(p) for p in same.parameters() if p.ndim == 4)
        assert torch.equal(run(same, images), expected)

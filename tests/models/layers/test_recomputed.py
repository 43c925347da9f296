"""Gradient checkpointing changes what is kept, and no number."""

import pytest
import torch

from ldm_lab.models.unet import UNet2DModel
from ldm_lab.models.vq_model import VQModel


def unet():
    blocks = {"down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"]}
    settings = {"block_out_channels": (16, 32), "norm_num_groups": 4, "layers_per_block": 1, "dropout": 0.2}
    model = UNet2DModel(8, **blocks, **settings)
    return model, lambda x: model(x, 3).sample


def autoencoder():
    model = VQModel(block_out_channels=(8,), norm_num_groups=4)
    return model, lambda x: model(x).sample


def step(model, call, x):
    """Result, gradients, and the bytes that the forward pass kept."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(1)  # of dropout
    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = call(x)
    y.square().mean().backward()
    return y.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None], sum(kept.values())


@pytest.mark.parametrize("make", [unet, autoencoder])
def test_the_same_gradients_with_less_kept(make):
    torch.manual_seed(0)
    model, call = make()
    x = torch.randn(4, 3, 16, 16)
    kept = step(model, call, x)
    model.enable_gradient_checkpointing()
    recomputed = step(model, call, x)
    assert torch.equal(recomputed[0], kept[0])
    torch.testing.assert_close(recomputed[1], kept[1])
    assert recomputed[2] < 0.8 * kept[2]
    model.disable_gradient_checkpointing()
    assert step(model, call, x)[2] == kept[2]

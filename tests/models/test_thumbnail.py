"""A start at which the latents are the image at their own size."""

import pytest
import torch
import torch.nn.functional as F

from ldm_lab import AutoencoderKL, VQModel
from ldm_lab.models.thumbnail import fits, start_as_thumbnail
from ldm_lab.utils.errors import UserError

LEVELS = {
    "block_out_channels": [16, 32, 64],
    "down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D", "DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D", "AttnUpDecoderBlock2D", "UpDecoderBlock2D"],
}


def first_stage(kind=VQModel, groups=4, latents=3, **changes):
    torch.manual_seed(0)
    return kind(**{**LEVELS, "norm_num_groups": groups, "latent_channels": latents, "layers_per_block": 2, **changes})


def pictures(channels=3):
    """Smooth colourful fields, of other brightness and contrast in each image: `(6, C, 32, 32)` in [-1, 1]."""
    random = torch.Generator().manual_seed(1)
    fields = F.interpolate(torch.rand(6, channels, 4, 4, generator=random), size=32, mode="bicubic")
    contrast = torch.tensor([0.1, 0.3, 0.5, 1.0, 1.0, 1.0])[:, None, None, None]
    means = torch.rand(6, channels, 1, 1, generator=random)
    return ((fields - 0.5) * contrast + means).clamp(0, 1) * 2 - 1


@pytest.mark.parametrize(
    "network",
    [
        lambda: first_stage(groups=1),
        lambda: first_stage(groups=2),
        lambda: first_stage(groups=4),
        lambda: first_stage(AutoencoderKL, latents=4),
        lambda: first_stage(latents=8, block_out_channels=[24, 24, 48], norm_num_groups=3),
        lambda: first_stage(in_channels=1, out_channels=1),
        lambda: first_stage(
            AutoencoderKL, groups=2, latents=5, in_channels=5, out_channels=5, block_out_channels=[24, 24, 48]
        ),
    ],
)
def test_latents_are_mean_colours_and_the_decoder_shows_them(network):
    autoencoder = network()
    colours = autoencoder.config.in_channels
    images = pictures(colours)
    small = F.avg_pool2d(images, 4)
    before = autoencoder.latents(images)[:, :colours]
    assert (before - small).square().mean().sqrt() > 0.3
    start_as_thumbnail(autoencoder)
    with torch.no_grad():
        latents = autoencoder.latents(images)
        decoded = autoencoder.decode(
            latents, **({"force_not_quantize": True} if isinstance(autoencoder, VQModel) else {})
        )
    assert fits(autoencoder.config, colours)
    assert (latents[:, :colours] - small).abs().mean() < 0.04
    assert (decoded.sample - F.interpolate(small, scale_factor=4.0)).abs().mean() < 0.06


def test_a_drawn_latent_is_near_its_mean():
    autoencoder = first_stage(AutoencoderKL)
    start_as_thumbnail(autoencoder)
    assert autoencoder.encode(pictures()).latent_dist.std.max() < 0.1


def test_every_layer_learns_from_the_first_steps_on():
    """Also those behind residual branches that begin at zero."""
    autoencoder, images = first_stage(), pictures()
    start_as_thumbnail(autoencoder)
    optimizer = torch.optim.SGD(autoencoder.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        (autoencoder(images).sample - images).square().mean().backward()
        optimizer.step()
    idle = [name for name, p in autoencoder.named_parameters() if p.grad is None or not p.grad.any()]
    assert [name for name in idle if "quantize" not in name] == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"groups": 8},
            r"model\.start=thumbnail: 16 channels in .*_groups=8 groups are 2 a group, .* need 4: ",
        ),
        ({"groups": 2, "block_out_channels": [8, 16, 32]}, "are 4 a group, and colours need 8"),
        ({"latents": 2}, "2 latent channels cannot hold three colours"),
    ],
)
def test_networks_that_cannot_hold_one_are_refused(changes, message):
    assert not fits(first_stage(**changes).config, 3)
    with pytest.raises(UserError, match=message):
        start_as_thumbnail(first_stage(**changes))

"""Decoding in parts: tiles blend without seams, and what the decoder does locally stays as it was."""

import pytest
import torch
import torch.nn.functional as F

from ldm_lab.models.kl_model import AutoencoderKL
from ldm_lab.models.tiling import Tiles
from ldm_lab.models.vq_model import VQModel


def doubled(z):
    """A decoder of factor 2 that sees each position alone, so that tiles change nothing."""
    return F.interpolate(z, scale_factor=2)


@pytest.mark.parametrize("shape", [(2, 3, 19, 8), (1, 3, 8, 8), (1, 1, 5, 30), (1, 2, 17, 17)])
@pytest.mark.parametrize("overlap", [0, 1, 4])
def test_weights_of_tiles_add_up_to_one(shape, overlap):
    z = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(Tiles(8, overlap).decode(doubled, z, 2), doubled(z))


def test_tiles_have_one_shape_and_cross_fade():
    shapes, values = [], iter([0.0, 1.0])

    def constant(z):
        shapes.append(tuple(z.shape))
        return torch.full_like(doubled(z), next(values))

    image = Tiles(8, 4).decode(constant, torch.zeros(1, 1, 8, 12), 2)
    assert shapes == [(1, 1, 8, 8)] * 2
    row = image[0, 0, 0]
    assert row[:8].eq(0).all()
    assert row[16:].eq(1).all()
    steps = row[7:17].diff()
    assert steps.min() > 0
    assert steps.max() < 1.1 / 9  # eight pixels that both tiles know, in nine even steps


@pytest.mark.parametrize(("size", "overlap"), [(0, 0), (8, 5), (8, -1)])
def test_impossible_tiles(size, overlap):
    with pytest.raises(ValueError, match=f"tiles of {size} positions that share {overlap}"):
        Tiles(size, overlap)


def network(kind, levels, **arguments):
    torch.manual_seed(0)
    blocks = {
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": [8] * levels,
        "norm_num_groups": 4,
    }
    model = kind(**blocks, **arguments).eval()
    if kind is VQModel:
        torch.nn.init.normal_(model.quantize.embedding.weight)  # a new codebook lies so near zero that norms magnify it
    return model


@pytest.mark.parametrize("kind", [VQModel, AutoencoderKL])
@pytest.mark.parametrize("levels", [3, 4])
@torch.no_grad()
def test_tiles_and_slices_of_an_autoencoder(kind, levels):
    """At f = 4 and f = 8: tiles are near the whole image, slices equal it, and small maps are not cut at all."""
    model = network(kind, levels)
    z = torch.randn(2, model.embed_dim, 40, 48)
    whole = model.decode(z).sample
    model.enable_slicing()
    torch.testing.assert_close(model.decode(z).sample, whole, rtol=1e-4, atol=2e-4)  # sums in another order
    model.enable_tiling(32, 8)
    tiled = model.decode(z).sample
    assert tiled.shape == whole.shape
    assert not torch.equal(tiled, whole)
    assert (tiled - whole).square().mean() < 0.1 * whole.var()
    model.disable_slicing()
    small = z[:, :, :32, :32]
    with_tiles = model.decode(small).sample
    model.disable_tiling()
    torch.testing.assert_close(model.decode(small).sample, with_tiles, rtol=1e-4, atol=2e-4)


@torch.no_grad()
def test_the_decoder_never_sees_more_than_a_tile_of_an_image():
    model = network(VQModel, 3)
    seen = set()
    model.decoder.register_forward_pre_hook(lambda _, inputs: seen.add(tuple(inputs[0].shape)))
    model.enable_tiling(16, 4)
    model.enable_slicing()
    model.decode(torch.randn(2, 3, 40, 40))
    assert seen == {(1, 3, 16, 16)}

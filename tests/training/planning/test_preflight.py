"""What is refused before anything is trained."""

import pytest
import torch

from ldm_lab.models.kl_model import AutoencoderKL
from ldm_lab.models.unet import UNet2DModel
from ldm_lab.models.vq_model import VQModel
from ldm_lab.training.planning.preflight import check_fit
from tests.trained import copy, snapshot, train

DOWN, UP = ("DownEncoderBlock2D",) * 3, ("UpDecoderBlock2D",) * 3
ENCODER = {"block_out_channels": (8, 8, 8), "norm_num_groups": 8, "down_block_types": DOWN, "up_block_types": UP}


def unet(channels=3):
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    return UNet2DModel(
        in_channels=channels, out_channels=channels, block_out_channels=(8, 8), norm_num_groups=8, **blocks
    )


@pytest.mark.parametrize("size", [64, [64, 48], [32, 72]])
def test_a_size_that_is_a_multiple_of_all_factors_fits(size):
    check_fit(size, VQModel(**ENCODER), unet())
    check_fit(size, AutoencoderKL(**ENCODER, latent_channels=4), unet(4))


@pytest.mark.parametrize(
    ("size", "network", "advice"),
    [
        (66, None, "sides must be multiples of 4, e.g. 64"),
        (68, unet(), "sides must be multiples of 8, e.g. 64"),
        ([64, 50], unet(), r"sides must be multiples of 8, e.g. \[64, 48\]"),
    ],
)
def test_a_size_that_is_none_is_refused_with_the_nearest_that_is(size, network, advice):
    with pytest.raises(ValueError, match=rf"^data\.image_size=.* does not fit the networks: .*{advice}$"):
        check_fit(size, VQModel(**ENCODER), network)


def test_networks_that_are_filled_are_tried_without_their_weights():
    autoencoder = VQModel(**ENCODER)
    check_fit(64, autoencoder, unet())
    assert autoencoder.device == torch.device("cpu")


def test_a_first_stage_on_which_a_unet_has_begun_is_not_trained_on(tiny_runs, tmp_path):
    runs = copy(tiny_runs, tmp_path, "avatars")
    before = snapshot(runs)
    with pytest.raises(ValueError, match=r"^max_images=80 would train .*/autoencoder on from 64, but .*/diffusion is"):
        train(runs, "experiment=avatars", "max_images=80")
    assert snapshot(runs) == before
    train(runs, "experiment=avatars/diffusion", "max_images=80")  # as the message says
    assert (runs / "avatars/diffusion/samples/samples_000000080.png").is_file()


def test_a_decoder_alone_is_that_of_something(tmp_path):
    with pytest.raises(ValueError, match=r"^model\.train=decoder: of which autoencoder\? Name it with init="):
        train(tmp_path, "experiment=avatars/autoencoder", "model.train=decoder")

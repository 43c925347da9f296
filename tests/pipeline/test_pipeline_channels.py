"""Pipelines of images that are not 8-bit RGB: folders that diffusers loads too, and what the output types are."""

import json
import warnings

import numpy as np
import pytest
import torch

from ldm_lab import AutoencoderKL, DDIMScheduler, LDMPipeline, UNet2DModel, VQModel
from ldm_lab.utils.errors import UserError
from ldm_lab.utils.pixels import RGB_8_BIT, PixelFormat
from ldm_lab.utils.reading import LoadError

LEVELS = {
    "block_out_channels": [8, 16], "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2, "norm_num_groups": 4, "latent_channels": 3,
}  # fmt: skip
DEEP = (-3.0, 900.5)


def pipeline(channels, value_range=RGB_8_BIT.value_range, kind=VQModel):
    torch.manual_seed(0)
    autoencoder = kind(in_channels=channels, out_channels=channels, **LEVELS)
    autoencoder.value_range = value_range
    unet = UNet2DModel(
        sample_size=4, in_channels=3, out_channels=3, block_out_channels=[8, 8], layers_per_block=1,
        down_block_types=["DownBlock2D"] * 2, up_block_types=["UpBlock2D"] * 2, norm_num_groups=4,
    )  # fmt: skip
    pipe = LDMPipeline(autoencoder.eval(), unet.eval(), DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, kind="np"):
    return pipe(2, torch.Generator().manual_seed(3), num_inference_steps=2, output_type=kind).images


@pytest.mark.parametrize("channels", [1, 5])
def test_diffusers_loads_the_folder_in_silence_and_draws_the_same(tmp_path, channels, caplog):
    diffusers = pytest.importorskip("diffusers")
    pipe = pipeline(channels, DEEP)
    pipe.save_pretrained(tmp_path)
    diffusers.utils.logging.enable_propagation()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        there = diffusers.LDMPipeline.from_pretrained(tmp_path)
    diffusers.utils.logging.disable_propagation()
    assert not [record for record in caplog.records if "config" in record.getMessage()]
    there.set_progress_bar_config(disable=True)
    images, theirs = draw(pipe), draw(there)
    assert images.shape == theirs.shape == (2, 8, 8, channels)
    np.testing.assert_allclose(images, theirs, atol=2e-4)
    there.save_pretrained(tmp_path / "again")  # the range survives a round trip through diffusers
    assert LDMPipeline.from_pretrained(tmp_path / "again").vqvae.pixels == PixelFormat(channels, DEEP)


@pytest.mark.parametrize("kind", [VQModel, AutoencoderKL])
def test_the_range_is_part_of_the_model(tmp_path, kind):
    pipeline(5, DEEP, kind).save_pretrained(tmp_path)
    assert LDMPipeline.from_pretrained(tmp_path).vqvae.pixels == PixelFormat(5, DEEP)
    assert kind.from_pretrained(tmp_path / "vqvae").value_range == DEEP
    assert kind.from_pretrained(tmp_path / "vqvae").described()["_value_range"] == list(DEEP)


def test_folders_of_8_bit_images_hold_no_range(tmp_path):
    pipeline(1).save_pretrained(tmp_path)
    assert "_value_range" not in json.loads((tmp_path / "vqvae/config.json").read_text())
    assert LDMPipeline.from_pretrained(tmp_path).vqvae.pixels == PixelFormat(1)


@pytest.mark.parametrize("limits", ["0,1", [1], [0, "1"], [3, 2], [0, float("inf")], [True, False], {"low": 0}])
def test_what_is_no_range_is_refused(tmp_path, limits):
    pipeline(1).save_pretrained(tmp_path)
    path = tmp_path / "vqvae/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "_value_range": limits}))
    with pytest.raises(LoadError, match=r"vqvae.*(range|finite)"):
        LDMPipeline.from_pretrained(tmp_path)


def test_pil_images_are_grey_or_rgb():
    (image, _) = draw(pipeline(1), "pil")
    assert (image.mode, image.size) == ("L", (8, 8))
    assert np.abs(np.asarray(image) - draw(pipeline(1))[0, ..., 0] * 255).max() <= 0.5
    pipe = pipeline(5)
    with pytest.raises(UserError, match=r"output_type='pil': Pillow has no images of 5 channels; give 'np' or 'pt'"):
        pipe(1)
    assert draw(pipe, "pt").shape == (2, 5, 8, 8)

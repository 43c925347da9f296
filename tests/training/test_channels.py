"""Both stages on images that are not 8-bit RGB: grey ones of 16 bits with a KL first stage, five channels with VQ."""

import json
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from ldm_lab.metrics import own
from ldm_lab.models.autoencoders import load_autoencoder
from ldm_lab.pipeline import LDMPipeline
from ldm_lab.runs.record import read_run
from ldm_lab.tools.evaluate.evaluate import evaluate, evaluate_autoencoder
from ldm_lab.utils.errors import UserError
from ldm_lab.utils.pixels import PixelFormat
from ldm_lab.utils.reading import read_yaml
from tests.reliability.commands import ROOT, torchrun
from tests.tools.evaluate.requests import request
from tests.trained import SMALL, metrics, snapshot, train, undisturbed
from tests.training.test_resume import assert_same_training, interrupt

GREY, FIVE = PixelFormat(1, (0.0, 65535.0)), PixelFormat(5, (-3.0, 900.0))
RECIPES = {GREY: ("lsun_churches", "data.value_range=[0,65535]"), FIVE: ("celebahq", "data.value_range=[-3,900]")}
SHORT = ("max_images=32", "checkpoint_every=32", "callbacks.sample_grid.images=2", "callbacks.denoising_strip.images=1")


def settings(pixels):
    recipe, values = RECIPES[pixels]
    return f"experiment={recipe}", f"data.channels={pixels.channels}", values, SMALL


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("channels")
    for pixels in RECIPES:
        train(folder, *settings(pixels), *SHORT, "data.preview_channels=[0]")
    return folder


def run_of(runs, pixels):
    return runs / RECIPES[pixels][0]


@pytest.mark.parametrize("pixels", RECIPES)
def test_both_stages_train(runs, pixels):
    run = run_of(runs, pixels)
    pipe = LDMPipeline.from_pretrained(run)
    assert pipe.vqvae.pixels == load_autoencoder(run / "autoencoder/final").pixels == pixels
    assert LDMPipeline.from_pretrained(run / "diffusion/checkpoints/last.ckpt").vqvae.pixels == pixels
    model = read_yaml(run / "autoencoder/config.yaml")["model"]
    assert model["loss"]["discriminator"]["in_channels"] == pixels.channels
    last = max(metrics(run / "autoencoder").items())[1]
    assert {"val/psnr", "val/ssim"} <= last.keys()
    assert not {"val/psnr_chroma", "val/hues_kept"} & last.keys()
    pictures = [*(run / "autoencoder/samples").glob("*.png"), *(run / "diffusion/samples").glob("*.png")]
    names = {path.name.rpartition("_")[0] for path in pictures}
    assert names >= {"data", "reconstructions", "samples", "neighbours", "denoising"}
    for path in pictures:
        array = np.asarray(Image.open(path).convert("RGB"))
        assert path.name.startswith("codebook") or np.array_equal(array[..., 0], array[..., 1])
    assert read_run(run).stages.keys() == {"autoencoder", "diffusion"}


def test_diffusers_loads_the_result(runs):
    """That of VQ: diffusers' LDMPipeline has no UNet of the other recipe. `test_pipeline_channels` has one channel."""
    diffusers = pytest.importorskip("diffusers")
    folder, draw = run_of(runs, FIVE) / "diffusion/final", {"num_inference_steps": 2, "output_type": "np"}
    ours, theirs = LDMPipeline.from_pretrained(folder), diffusers.LDMPipeline.from_pretrained(folder)
    images = [pipe(2, torch.Generator().manual_seed(0), **draw).images for pipe in (ours, theirs)]
    assert images[0].shape == (2, 32, 32, 5)
    np.testing.assert_allclose(*images, atol=1e-3)


@pytest.mark.soak
@pytest.mark.parametrize("pixels", RECIPES)
def test_both_stages_resume_exactly(runs, pixels, tmp_path):
    own = (*settings(pixels), *SHORT, "data.preview_channels=[0]")
    for stage in ("autoencoder", "diffusion"):
        with pytest.raises(SystemExit):
            train(tmp_path, *own, *interrupt(stage, 16))
    train(tmp_path, *own)
    for stage in ("autoencoder", "diffusion"):
        assert_same_training(run_of(tmp_path, pixels) / stage, run_of(runs, pixels) / stage)


@pytest.mark.soak
@pytest.mark.parametrize("pixels", RECIPES)
def test_two_processes_draw_the_samples_of_one(runs, pixels, tmp_path):
    run = run_of(runs, pixels)
    with undisturbed():
        sample.job(command(run, tmp_path / "one", num_samples=5))
    several = {"num_samples": 5, "trainer": "ddp", "trainer.accelerator": "cpu", "trainer.devices": 2}
    done = subprocess.run(torchrun("sample.py", *command(run, tmp_path / "two", **several)), cwd=ROOT, check=False)
    assert done.returncode == 0
    one, two = (sorted((tmp_path / name / "images").iterdir()) for name in ("one", "two"))
    assert len(one) == 5
    assert [path.name for path in one] == [path.name for path in two]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(one, two, strict=True))


def command(run, output, **more):
    more = {"num_samples": 3, "batch_size": 2, "sampler.steps": 2, "trainer": "cpu", **more}
    return [f"ckpt={run}", f"output={output}", *(f"{key}={value}" for key, value in more.items())]


def test_samples_are_files_of_the_data_s_own_values(runs, tmp_path):
    run, output = run_of(runs, FIVE), tmp_path / "five"
    with undisturbed():
        sample.job(command(run, output, denoising=1, interpolate="[0,1]", preview_channels="[4,0,2]"))
    array = np.load(output / "images/000002.npy", allow_pickle=False)
    assert (array.shape, array.dtype) == ((32, 32, 5), np.float32)
    assert array.min() >= -3
    assert array.max() <= 900
    assert json.loads((output / "manifest.json").read_text())["files"] == {
        "channels": 5, "value_range": [-3.0, 900.0], "bit_depth": 32,
    }  # fmt: skip
    assert (output / "denoising.webp").is_file()
    assert not (output / "samples.npz").exists()
    before = snapshot(output / "images")
    (output / "images/000001.npy").write_bytes(b"half")
    with undisturbed():
        sample.job(command(run, output))
    after = snapshot(output / "images")
    assert [str(name) for name in before if before[name] != after[name]] == ["000001.npy"]
    assert np.load(output / "images/000001.npy").shape == (32, 32, 5)


def test_png_files_have_16_bits_where_it_is_asked_for(runs, tmp_path):
    run = run_of(runs, GREY)
    with undisturbed():
        for depth in (8, 16):
            sample.job(command(run, tmp_path / str(depth), bit_depth=depth))
    shallow, deep = (np.asarray(Image.open(tmp_path / str(depth) / "images/000000.png")) for depth in (8, 16))
    assert (shallow.dtype, deep.dtype) == (np.uint8, np.uint16)
    assert np.abs(shallow - deep / 257).max() <= 0.51
    assert (deep % 257 != 0).any()


@pytest.mark.parametrize("pixels", RECIPES)
def test_evaluation_in_the_range_of_the_data(runs, tmp_path, monkeypatch, pixels):
    monkeypatch.setattr(own, "STEPS", 2)
    run = run_of(runs, pixels)
    with undisturbed():
        drawn = evaluate(request(run, tmp_path / "cache"))
        (folder,) = (run / "samples").iterdir()
        data = {"data": str(folder / "images"), "image_size": (32, 32)} if pixels == FIVE else {}
        quality = evaluate_autoencoder(request(run, tmp_path / "cache", output=tmp_path))
        if data:  # the samples as images, and as real images
            again = evaluate(request(folder, tmp_path / "cache", output=tmp_path, **data))
            assert again["fd_own"].value < 1e-3
    assert {"fd_own", "kid", "near_copies"} <= drawn.keys()
    assert 0 < quality["psnr"].value < 60
    assert 0 < quality["ssim"].value < 1
    assert any((run / "eval").glob("*_neighbours.png"))
    if pixels == FIVE:
        assert "lpips" not in quality
        with pytest.raises(UserError, match=r"features=inception: sees RGB or grey, not 5 channels; own features"):
            evaluate(request(run, tmp_path / "cache", features="inception"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("init={rgb}", r"init=.*rgb: its autoencoder is for images of 3 channel\(s\), and those here have 5"),
        ("autoencoder={grey}", r"autoencoder=.*: is for images of 1 channel\(s\), and those here have 5"),
    ],
)
def test_models_of_other_channels_are_refused(runs, tmp_path, override, message):
    rgb, model = tmp_path / "rgb", load_autoencoder(run_of(runs, FIVE))
    type(model).from_config(dict(model.config), in_channels=3, out_channels=3).save_pretrained(rgb)
    source = override.format(rgb=rgb, grey=run_of(runs, GREY) / "autoencoder/final")
    with pytest.raises(UserError, match=message):
        train(tmp_path, *settings(FIVE), source)

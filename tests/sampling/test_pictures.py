"""Pictures that explain a model: each against what it is made of, and through the command."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from ldm_lab import LDMPipeline
from ldm_lab.diffusion import samplers
from ldm_lab.diffusion.flow_euler import FlowMatchEulerDiscreteScheduler
from ldm_lab.sampling import pictures
from ldm_lab.sampling.pictures import read_images, slerp
from ldm_lab.utils.images import to_unit
from tests.sampling.test_sample_command import MODEL, command


@pytest.fixture(scope="module")
def pipe():
    pipe = LDMPipeline.from_pretrained(MODEL)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe, indices, steps, eta=0.0):
    generators = pictures.generators(0, indices)
    return pipe(len(indices), generators, eta, steps, output_type="pt").images


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("steps", [3, 15])
def test_a_denoising_ends_at_the_samples(pipe, steps, eta):
    """The last step's x0 is where it ends: the chain's end is clean."""
    frames = pictures.denoising(pipe, range(2), seed=0, steps=steps, eta=eta)
    assert frames.shape == (min(steps, pictures.STEPS_SHOWN), 2, 3, 32, 32)
    assert torch.allclose(to_unit(frames[-1]), drawn(pipe, [0, 1], steps, eta), atol=0.02)
    assert not torch.allclose(frames[0], frames[-1], atol=0.02)


def test_interpolations_go_from_sample_to_sample(pipe):
    legs = pictures.interpolation(pipe, [4, 0, 2], seed=0, steps=2, batch_size=5)
    assert legs.shape == (2, pictures.BETWEEN, 3, 32, 32)
    four, zero, two = drawn(pipe, [4, 0, 2], 2) * 2 - 1
    for found, expected in ((legs[0, 0], four), (legs[0, -1], zero), (legs[1, 0], zero), (legs[1, -1], two)):
        assert torch.allclose(found, expected, atol=1e-4)


SDE = {"algorithm_type": "sde-dpmsolver++"}


@pytest.mark.parametrize(
    ("sampler", "eta", "settings"),
    [("ddim", 0.0, {}), ("ddim", 1.0, {}), ("ddpm", 0.0, {}), ("dpm_solver", 0.0, {}), ("dpm_solver", 0.0, SDE)],
)
def test_the_ends_of_an_interpolation_are_the_samples_also_where_steps_add_noise(pipe, sampler, eta, settings):
    scheduler = samplers.choose(sampler, pipe.scheduler, eta)
    other = LDMPipeline(pipe.vqvae, pipe.unet, type(scheduler).from_config(scheduler.config, **settings))
    other.set_progress_bar_config(disable=True)
    legs = pictures.interpolation(other, [4, 0, 2], seed=0, steps=5, eta=eta, batch_size=7)
    four, zero, two = drawn(other, [4, 0, 2], 5, eta) * 2 - 1
    for found, expected in ((legs[0, 0], four), (legs[0, -1], zero), (legs[1, 0], zero), (legs[1, -1], two)):
        assert torch.allclose(found, expected, atol=1e-4)
    ways = legs.diff(dim=1).flatten(2).norm(dim=2)  # from frame to frame
    assert ways.max() < (four - two).norm()


def test_slerp_stays_on_the_sphere_and_turns_evenly():
    a, b = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 3.0])
    third = slerp(a, b, 1 / 3)
    assert torch.allclose(third, 3 * torch.tensor([math.cos(math.pi / 6), math.sin(math.pi / 6)]))
    assert torch.equal(slerp(a, a, 0.5), a)
    noise = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert slerp(*noise, 0.5).std() == pytest.approx(1, abs=0.02)  # a straight line would have 0.71


def test_the_weaker_a_variation_the_nearer_it_is(pipe):
    image = pictures.denoising(pipe, range(1), seed=3, steps=2)[-1, 0].clamp(-1, 1)
    copy = pictures.reconstructions(pipe.vqvae, image[None])
    distances = [
        (pictures.variations(pipe, image, 4, strength, seed=0, steps=50) - copy).square().mean().item()
        for strength in (0.02, 0.5, 1.0)
    ]
    assert distances == sorted(distances)
    assert distances[0] < 0.1 * distances[-1]


@pytest.mark.parametrize("sampler", samplers.SAMPLERS)
def test_variations_work_with_every_sampler_and_differ(pipe, sampler):
    own = FlowMatchEulerDiscreteScheduler(shift=2.0) if sampler.startswith("flow") else pipe.scheduler
    other = LDMPipeline(pipe.vqvae, pipe.unet, samplers.choose(sampler, own))
    image = torch.zeros(3, 32, 32)
    found = pictures.variations(other, image, 2, 0.7, seed=0, steps=10)
    assert found.isfinite().all()
    assert not torch.allclose(found[0], found[1], atol=0.01)
    assert torch.equal(found, pictures.variations(other, image, 2, 0.7, seed=0, steps=10))


def test_the_command_writes_them_without_samples_too(tmp_path, capsys):
    photo = tmp_path / "photo.jpg"
    Image.fromarray(np.full((50, 40, 3), 128, np.uint8)).save(photo)
    output = tmp_path / "out"
    wanted = {"denoising": 2, "interpolate": "[0,1]", "variation": photo, "reconstruct": tmp_path}
    sample.job(command(output, num_samples=0, **wanted))
    assert "0 samples (0 new)" in capsys.readouterr().out
    names = "denoising.png denoising.webp interpolation.png interpolation.webp variations.png reconstructions.png"
    assert {path.name for path in output.iterdir()} == {"manifest.json", *names.split()}
    with Image.open(output / "interpolation.webp") as animation:
        assert (animation.n_frames, animation.info["loop"]) == (pictures.BETWEEN, 0)
    with Image.open(output / "variations.png") as sheet:  # the image itself comes first
        assert np.abs(np.asarray(sheet)[4:30, 4:30].astype(int) - 128).max() <= 1
    sample.job(command(output, num_samples=1, **wanted))  # what is there belongs to the same model: go on
    assert (output / "images/000000.png").is_file()


def test_a_picture_above_the_limit_names_the_key(tmp_path, monkeypatch):
    Image.new("RGB", (30, 40)).save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for limit in (None, 1199):
        with pytest.raises(ValueError, match=r"^reconstruct=.*: x\.png: 1,200 pixels, .*: max_pixels=1200 takes it$"):
            read_images(tmp_path, (8, 8), 4, "reconstruct", limit)
    assert read_images(tmp_path, (8, 8), 4, "reconstruct", 1200).shape == (1, 3, 8, 8)


@pytest.mark.parametrize(
    ("content", "said"),
    [("a letter", "expected JPEG, PNG"), ("version https://git-lfs.github.com/spec/", "git lfs pull")],
)
def test_a_file_that_is_none_says_what_was_expected(tmp_path, content, said):
    (tmp_path / "x.png").write_text(content)
    with pytest.raises(ValueError, match=rf"^variation=.*x\.png is not an image that can be read: .*{said}"):
        read_images(tmp_path / "x.png", (8, 8), 1, "variation")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"denoising": -1}, "^denoising=-1: must be a whole number"),
        ({"interpolate": "3"}, "^interpolate=3: name two"),
        ({"interpolate": "[a,1]"}, "^interpolate=.*: name two"),
        ({"interpolate": "[3]"}, r"^interpolate=\[3\]: name two"),
        ({"variation": "nowhere.png"}, "^variation=nowhere.png: no image file"),
        ({"reconstruct": MODEL / "model_index.json"}, "^reconstruct=.*model_index.json is not an image"),
        ({"max_pixels": 0}, "^max_pixels=0: must be a whole number, at least 1 or null$"),
        ({"variation": "x.png", "strength": 0}, r"^strength=0: must lie in"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_drawn(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        sample.job(command(tmp_path / "out", **settings))
    assert not (tmp_path / "out").exists()

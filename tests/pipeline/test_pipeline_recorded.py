"""LDMPipeline against what was recorded of its namesake, and half precision against single."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ldm_lab import DDIMScheduler, LDMPipeline
from tests.helpers import GOLDEN, assert_close_relative

FOLDER = GOLDEN / "diffusers"
META = json.loads((FOLDER / "golden.json").read_text())
STEPS, BATCH = META["steps"], META["batch"]
FOLDERS = pytest.mark.parametrize("folder", ["ldm_tiny", "ldm_tiny_legacy"])


@pytest.fixture(scope="module")
def golden():
    return load_file(FOLDER / "golden.safetensors")


def load(folder="ldm_tiny", **options):
    pipe = LDMPipeline.from_pretrained(FOLDER / folder, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed=META["generator_seed"]):
    return torch.Generator().manual_seed(seed)


def assert_same_images(actual, expected):
    """Images in [0, 1]."""
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), atol=1e-4, rtol=0)


class Replaying(DDIMScheduler):
    """Adds recorded noise in each step, whatever the generator."""

    def step(self, model_output, timestep, sample, eta=0.0, generator=None):
        noise = self.noise[self.timesteps.tolist().index(int(timestep))]
        return super().step(model_output, timestep, sample, eta=eta, variance_noise=noise)


def replaying(pipe, noise):
    pipe.scheduler = Replaying.from_config(pipe.scheduler.config)
    pipe.scheduler.noise = noise
    return pipe


@torch.no_grad()
@pytest.mark.parametrize("eta", [0, 1])
@FOLDERS
def test_trajectories(golden, folder, eta):
    pipe = replaying(load(folder), golden["pipe.variance_noise"])
    seen = []
    images = pipe(
        eta=float(eta),
        num_inference_steps=STEPS,
        output_type="np",
        latents=golden["pipe.initial_noise"],
        callback=lambda step, timestep, latents: seen.append((step, timestep, latents)),
    ).images
    assert [step for step, _, _ in seen] == list(range(STEPS))
    assert [timestep for _, timestep, _ in seen] == META["timesteps_pipe"]
    for (_, _, latents), expected in zip(seen, golden[f"pipe.eta{eta}.latents_each_step"], strict=True):
        assert_close_relative(latents, expected)
    latents = seen[-1][2] / pipe.vqvae.config.scaling_factor
    assert_close_relative(latents, golden[f"pipe.eta{eta}.latents_over_scale"])
    assert_same_images(images, golden[f"pipe.eta{eta}.images_np"])
    unquantized = pipe.vqvae.decode(latents, force_not_quantize=True).sample
    unquantized = (unquantized / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)  # (B, 3, H, W) -> (B, H, W, 3)
    assert_same_images(unquantized, golden[f"pipe.eta{eta}.images_np_not_quantized"])


@FOLDERS
def test_images_from_a_generator(golden, folder):
    pipe, starts = load(folder), []
    pipe.unet.register_forward_pre_hook(lambda _, args: starts.append(args[0]))
    images = pipe(BATCH, seeded(), num_inference_steps=STEPS, output_type="np").images
    assert torch.equal(starts[0], golden["pipe.generator.initial_noise"])
    assert_same_images(images, golden["pipe.generator.images_np"])
    pictures = pipe(BATCH, seeded(), num_inference_steps=STEPS).images
    assert {(picture.mode, picture.size) for picture in pictures} == {(META["pil"]["mode"], tuple(META["pil"]["size"]))}
    difference = np.stack([np.asarray(p) for p in pictures]).astype(int) - golden["pipe.generator.images_uint8"].numpy()
    assert np.abs(difference).max() <= 1  # 1e-4 may lie across the border of two bytes
    assert (difference != 0).mean() < 0.01


def test_images_with_eta(golden):
    """There the noise of the steps came from the global generator; here it is given."""
    pipe = replaying(load(), golden["pipe.generator_eta1.variance_noise"])
    images = pipe(BATCH, seeded(), eta=1.0, num_inference_steps=STEPS, output_type="np").images
    assert_same_images(images, golden["pipe.generator_eta1.images_np"])


def test_images_from_a_list_of_generators(golden):
    generators = [seeded(META["generator_seed"] + index) for index in range(BATCH)]
    images = load()(BATCH, generators, num_inference_steps=STEPS, output_type="np").images
    assert_same_images(images, golden["pipe.generator_list.images_np"])


def test_the_folder_of_2022_is_the_same_model():
    pipes = load("ldm_tiny"), load("ldm_tiny_legacy")
    assert torch.equal(*(pipe(1, seeded(), num_inference_steps=2, output_type="pt").images for pipe in pipes))


# Half precision.

HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def rounded(dtype):
    """Single precision, with the weights and what every module returns rounded to `dtype`: what rounding explains."""
    pipe = load().to(dtype).to(torch.float32)
    for module in (*pipe.unet.modules(), *pipe.vqvae.modules()):
        module.register_forward_hook(
            lambda _, args, output: output.to(dtype).float() if isinstance(output, torch.Tensor) else None
        )
    return pipe


def distance(actual, reference):
    return ((actual - reference).norm() / reference.norm()).item()


@HALVES
def test_latents_in_half_precision_are_as_far_off_as_rounding_explains(golden, dtype):
    """Over 20 steps: had the latents themselves been kept in half precision, they would be twice as far off."""
    call = {"latents": golden["pipe.initial_noise"], "num_inference_steps": 20, "output_type": "latent"}
    half = load(torch_dtype=dtype)
    assert half.dtype == half.vqvae.dtype == dtype
    exact, ours, explained = (pipe(**call).images for pipe in (load(), half, rounded(dtype)))
    assert ours.dtype == torch.float32
    assert distance(ours, exact) < 1.3 * distance(explained, exact)


@torch.no_grad()
@HALVES
def test_images_in_half_precision_are_as_far_off_as_rounding_explains(golden, dtype):
    """A latent falls to another code only where the two nearest lie close; from the same codes come the same images."""
    scaled, half, single = golden["pipe.eta0.latents_each_step"][-1], load(torch_dtype=dtype), load()
    latents = scaled / single.vqvae.config.scaling_factor
    codes, coarse = single.vqvae.quantize, half.vqvae.quantize
    ours, exact = (pipe.vqvae.quantize(latents.to(pipe.dtype)).info.indices for pipe in (half, single))

    points = latents.movedim(1, -1).flatten(0, 2)  # (B, C, h, w) -> (B*h*w, C)
    nearest, second = torch.cdist(points, codes.embedding.weight).topk(2, largest=False).values.unbind(1)
    error = (points.to(dtype).float() - points).norm(dim=1)
    error += (coarse.embedding.weight.float() - codes.embedding.weight).norm(dim=1).max()
    certain = second - nearest > 2 * error
    assert certain.float().mean() > 0.5
    assert torch.equal(ours[certain], exact[certain])

    shape = (*latents.shape[:1], *latents.shape[2:], latents.shape[1])
    quantized = codes.get_codebook_entry(exact, shape)
    images, expected, explained = (
        pipe.vqvae.decode(quantized.to(pipe.dtype), force_not_quantize=True).sample.float()
        for pipe in (half, single, rounded(dtype))
    )
    assert distance(images, expected) < 1.3 * distance(explained, expected)

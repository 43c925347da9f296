"""What LDMPipeline promises. That it equals its namesake: test_pipeline_recorded.py."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ldm_lab import DDIMScheduler, DDPMScheduler, LDMPipeline, UNet2DModel, VQModel
from tests.helpers import assert_close_relative

# The recorded set that lies here, whatever other set may be tried: its sizes are written out below.
FOLDER = Path(__file__).parents[1] / "golden/diffusers/ldm_tiny"


def load(folder=FOLDER):
    pipe = LDMPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe():
    return load()


def seeded(seed=123):
    return torch.Generator().manual_seed(seed)


# Results.


def test_output_types(pipe):
    size = {"num_inference_steps": 2, "batch_size": 2}
    kinds = ("pil", "np", "pt", "latent")
    outputs = {kind: pipe(**size, generator=seeded(), output_type=kind).images for kind in kinds}
    assert [(picture.mode, picture.size) for picture in outputs["pil"]] == [("RGB", (32, 32))] * 2
    assert (outputs["np"].shape, outputs["np"].dtype) == ((2, 32, 32, 3), np.float32)
    assert (outputs["pt"].shape, outputs["pt"].dtype) == ((2, 3, 32, 32), torch.float32)
    assert (outputs["latent"].shape, outputs["latent"].dtype) == ((2, 3, 16, 16), torch.float32)
    assert 0 <= outputs["pt"].min() < 0.5 < outputs["pt"].max() <= 1
    assert np.array_equal(outputs["np"], outputs["pt"].permute(0, 2, 3, 1).numpy())
    assert np.array_equal(np.asarray(outputs["pil"][1]), (outputs["np"][1] * 255).round().astype(np.uint8))


def test_the_default_is_pictures_one_of_them(pipe):
    output = pipe(num_inference_steps=1)
    assert [type(picture).__name__ for picture in output.images] == ["Image"]
    assert output["images"] is output[0] is output.to_tuple()[0] is output.images


def test_a_tuple_on_request(pipe):
    images = pipe(generator=seeded(), num_inference_steps=1, output_type="pt").images
    result = pipe(generator=seeded(), num_inference_steps=1, output_type="pt", return_dict=False)
    assert type(result) is tuple
    assert len(result) == 1
    assert torch.equal(result[0], images)


def test_latents_are_scaled_on_the_way_in_and_out(pipe):
    """What comes out as "latent" decodes to the images once it is divided by the factor."""
    noise = torch.randn(2, 3, 16, 16, generator=seeded())
    plain = pipe(latents=noise, num_inference_steps=2, output_type="latent").images
    images = pipe(latents=noise, num_inference_steps=2, output_type="pt").images
    assert_close_relative(pipe(2, seeded(), num_inference_steps=2, output_type="latent").images, plain)
    pipe.vqvae.register_to_config(scaling_factor=0.5)
    assert torch.equal(pipe(latents=noise, num_inference_steps=2, output_type="latent").images, plain)
    scaled = pipe(latents=noise, num_inference_steps=2, output_type="pt").images
    assert not torch.equal(scaled, images)
    assert torch.equal(scaled, (pipe.vqvae.decode(2 * plain).sample.detach() / 2 + 0.5).clamp(0, 1))


def test_the_start_is_left_as_it_was(pipe):
    noise = torch.randn(1, 3, 16, 16)
    before = noise.clone()
    pipe(latents=noise, num_inference_steps=2, output_type="latent")
    assert torch.equal(noise, before)


def test_latents_may_have_another_size(pipe):
    images = pipe(latents=torch.randn(1, 3, 8, 12), num_inference_steps=1, output_type="pt").images
    assert images.shape == (1, 3, 16, 24)


def test_a_size_that_is_not_square(pipe, tmp_path):
    pipe.unet.register_to_config(sample_size=(8, 12))
    pipe.save_pretrained(tmp_path)
    for each in (pipe, load(tmp_path)):
        assert each(2, num_inference_steps=1, output_type="latent").images.shape == (2, 3, 8, 12)


def test_a_network_without_a_size_asks_for_latents(pipe):
    pipe.unet.register_to_config(sample_size=None)
    with pytest.raises(ValueError, match="no sample_size: pass latents="):
        pipe(num_inference_steps=1)
    assert pipe(latents=torch.randn(1, 3, 8, 8), num_inference_steps=1, output_type="latent").images.shape[-1] == 8


@pytest.mark.parametrize("scheduler", [DDIMScheduler, DDPMScheduler])
def test_as_many_steps_as_asked_for(pipe, scheduler):
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    calls = []
    pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    pipe(num_inference_steps=3, output_type="latent")
    assert len(calls) == 3


# Randomness.


@pytest.mark.parametrize(("kind", "eta"), [(DDIMScheduler, 0.0), (DDIMScheduler, 1.0), (DDPMScheduler, 0.0)])
def test_the_generator_governs_every_number(pipe, kind, eta):
    pipe.scheduler = kind.from_config(pipe.scheduler.config)
    images = []
    for global_seed, seed in ((0, 7), (1, 7), (1, 8)):
        torch.manual_seed(global_seed)
        images.append(pipe(1, seeded(seed), eta=eta, num_inference_steps=3, output_type="latent").images)
    assert torch.equal(images[0], images[1])
    assert not torch.equal(images[1], images[2])


@pytest.mark.parametrize(("kind", "eta"), [(DDIMScheduler, 1.0), (DDPMScheduler, 0.0)])
def test_a_generator_each_makes_images_independent_of_the_batch(pipe, kind, eta):
    pipe.scheduler = kind.from_config(pipe.scheduler.config)
    starts = []
    pipe.unet.register_forward_pre_hook(lambda _, args: starts.append(args[0]))
    settings = {"eta": eta, "num_inference_steps": 3, "output_type": "latent"}
    together = pipe(3, [seeded(seed) for seed in (1, 2, 3)], **settings).images
    alone = pipe(1, [seeded(2)], **settings).images
    assert torch.equal(starts[0][1:2], starts[3])
    assert_close_relative(together[1:2], alone)


def test_eta_matters(pipe):
    images = [pipe(1, seeded(), eta, 3, "latent").images for eta in (0.0, 0.5, 1.0)]
    assert not torch.equal(images[0], images[1])
    assert not torch.equal(images[1], images[2])


# Parts.


def test_parts_are_shared_and_moved_together(pipe):
    twin = LDMPipeline(**pipe.components)
    assert twin.unet is pipe.unet
    assert pipe.to(torch.float64) is pipe
    assert {twin.dtype, twin.vqvae.dtype} == {torch.float64}
    assert pipe.to("cpu", torch.float32).device == torch.device("cpu")


def test_parts_that_do_not_fit_are_refused(pipe):
    with torch.device("meta"):
        config = pipe.vqvae.config
        vqvae = VQModel.from_config(config, vq_embed_dim=4)
        unet = UNet2DModel.from_config(pipe.unet.config, out_channels=6)
    with pytest.raises(ValueError, match=r"in_channels=3 and out_channels=3, but the latents .* have 4 channels"):
        LDMPipeline(vqvae, pipe.unet, pipe.scheduler)
    with pytest.raises(ValueError, match=r"in_channels=3 and out_channels=6, but the latents .* have 3 channels"):
        LDMPipeline(pipe.vqvae, unet, pipe.scheduler)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"output_type": "nonsense"}, "output_type is 'nonsense', must be one of pil, np, numpy, pt, latent"),
        ({"batch_size": 0}, "batch_size is 0, must be a positive integer"),
        ({"batch_size": 2.0}, "batch_size is 2.0, must be a positive integer"),
        ({"latents": torch.zeros(3, 16, 16)}, r"latents have shape \(3, 16, 16\), must be \(B, 3, h, w\)"),
        ({"latents": torch.zeros(1, 4, 16, 16)}, r"latents have shape \(1, 4, 16, 16\), must be \(B, 3, h, w\)"),
        ({"latents": torch.zeros(1, 3, 15, 16)}, "multiples of 2, got 15x16"),
        ({"num_inference_steps": 1001}, "num_inference_steps"),
        ({"eta": -1.0}, "eta"),
    ],
)
def test_arguments_out_of_range(pipe, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        pipe(**{"num_inference_steps": 1, **arguments})
    assert "\n" not in str(error.value)


def test_only_ddim_has_an_eta(pipe):
    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match=r"eta is 1.0, but DDPMScheduler has none"):
        pipe(eta=1.0, num_inference_steps=1)


def test_the_progress_bar_counts_the_steps(pipe, capsys):
    pipe.set_progress_bar_config(desc="drawing")
    pipe(num_inference_steps=2, output_type="latent")
    assert "drawing: 100%" in capsys.readouterr().err
    pipe.set_progress_bar_config(disable=True)
    pipe(num_inference_steps=2, output_type="latent")
    assert capsys.readouterr().err == ""

"""Schedulers of diffusers in our pipeline, and ours in its."""

import inspect
import json

import numpy as np
import pytest
import torch

from ldm_lab import DDIMScheduler, LDMPipeline
from ldm_lab.diffusion.flow import is_flow
from ldm_lab.diffusion.flow_euler import FlowMatchEulerDiscreteScheduler
from ldm_lab.diffusion.flow_heun import FlowMatchHeunDiscreteScheduler
from ldm_lab.diffusion.samplers import SAMPLERS
from ldm_lab.utils.reading import LoadError
from tests.helpers import GOLDEN, assert_close_relative

diffusers = pytest.importorskip("diffusers")

FOLDER = GOLDEN / "diffusers" / "ldm_tiny"
NAMES = [
    "DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "LMSDiscreteScheduler", "EulerDiscreteScheduler",
    "HeunDiscreteScheduler", "EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler",
    "DEISMultistepScheduler", "UniPCMultistepScheduler",
]  # fmt: skip
EACH = pytest.mark.parametrize("name", NAMES)


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed=5):
    return torch.Generator().manual_seed(seed)


def swapped(name, **settings):
    """The pipeline with the scheduler of diffusers in the place of its own."""
    if name == "LMSDiscreteScheduler":
        pytest.importorskip("scipy")
    pipe = quiet(LDMPipeline.from_pretrained(FOLDER))
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **settings)
    return pipe


@torch.no_grad()
def by_hand(pipe, scheduler, generator, steps, eta=0.0):
    """What the scheduler makes of the noise, as its documentation tells one to go through its timesteps."""
    scheduler.set_timesteps(steps)
    x = torch.randn(2, 3, 16, 16, generator=generator) * scheduler.init_noise_sigma
    known = inspect.signature(scheduler.step).parameters
    options = {key: value for key, value in {"eta": eta, "generator": generator}.items() if key in known}
    for t in scheduler.timesteps:
        predicted = pipe.unet(scheduler.scale_model_input(x, t), t).sample
        x = scheduler.step(predicted, t, x, **options).prev_sample
    return x


@EACH
def test_a_scheduler_of_diffusers_draws_what_its_own_loop_does(name):
    pipe = swapped(name, timestep_spacing="leading")  # where the first level depends on the number of steps
    eta = 0.7 if name == "DDIMScheduler" else 0.0
    twin = getattr(diffusers, name).from_config(pipe.scheduler.config)
    for _ in range(2):  # the second call is as the first
        drawn = pipe(2, seeded(), eta, num_inference_steps=4, output_type="latent").images
        assert_close_relative(drawn, by_hand(pipe, twin, seeded(), 4, eta), 1e-5)


@EACH
def test_the_generator_governs_every_number_of_theirs_too(name):
    pipe, images = swapped(name), []
    for global_seed in (0, 1):
        torch.manual_seed(global_seed)
        images.append(pipe(1, seeded(), num_inference_steps=4, output_type="latent").images)
    assert torch.equal(*images)


@EACH
def test_a_pipeline_with_a_scheduler_of_diffusers_can_be_saved(name, tmp_path):
    pipe = swapped(name, timestep_spacing="trailing")  # see docs/checkpoints.md for the noise of "leading"
    drawn = pipe(1, seeded(), num_inference_steps=4, output_type="np").images
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["scheduler"] == ["diffusers", name]
    theirs = quiet(diffusers.LDMPipeline.from_pretrained(tmp_path))
    assert type(theirs.scheduler).__name__ == name
    if "generator" not in inspect.signature(theirs.scheduler.step).parameters:  # which their pipeline does not pass
        images = theirs(1, seeded(), num_inference_steps=4, output_type="np").images
        np.testing.assert_allclose(images, drawn, atol=1e-4, rtol=0)
    if name in (kind.__name__ for kind in SAMPLERS.values()):
        back = quiet(LDMPipeline.from_pretrained(tmp_path))
        again = back(1, seeded(), num_inference_steps=4, output_type="np").images
        np.testing.assert_allclose(again, drawn, atol=1e-4, rtol=0)
    else:
        with pytest.raises(LoadError, match=f"scheduler is diffusers.{name}; known are"):
            LDMPipeline.from_pretrained(tmp_path)


@EACH
def test_the_way_back_to_ours_keeps_the_settings(name):
    before = LDMPipeline.from_pretrained(FOLDER).scheduler
    after = DDIMScheduler.from_config(swapped(name).scheduler.config)
    assert {key: after.config[key] for key in before.config} == before.config


def test_eta_where_there_is_none():
    with pytest.raises(ValueError, match=r"eta is 0\.5, but EulerDiscreteScheduler has none"):
        swapped("EulerDiscreteScheduler")(1, seeded(), 0.5, num_inference_steps=2)


def test_more_evaluations_than_steps_are_all_counted():
    """Heun's method takes two for each step but the last."""
    pipe, steps = swapped("HeunDiscreteScheduler"), []
    pipe(1, num_inference_steps=3, output_type="latent", callback=lambda index, *_: steps.append(index))
    assert steps == [0, 1, 2, 3, 4]
    assert pipe.scheduler.order == 2


@pytest.mark.parametrize("kind", SAMPLERS.values(), ids=SAMPLERS)
def test_ours_serves_in_their_pipeline(kind):
    ours, theirs = quiet(LDMPipeline.from_pretrained(FOLDER)), quiet(diffusers.LDMPipeline.from_pretrained(FOLDER))
    ours.scheduler = theirs.scheduler = kind() if is_flow(kind) else kind.from_config(ours.scheduler.config)
    torch.manual_seed(0)
    drawn = theirs(1, seeded(), num_inference_steps=4, output_type="np").images
    torch.manual_seed(0)
    ours.scheduler.set_timesteps(4)
    start = torch.randn(1, 3, 16, 16, generator=seeded())
    np.testing.assert_allclose(ours(latents=start, num_inference_steps=4, output_type="np").images, drawn, atol=1e-4)


def test_a_folder_of_flow_matching_is_for_ours_alone(tmp_path):
    """The schedulers of these names in diffusers lack what its `LDMPipeline` calls."""
    pipe = quiet(LDMPipeline.from_pretrained(FOLDER))
    for kind in (FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler):
        assert not hasattr(getattr(diffusers, kind.__name__), "scale_model_input")
        pipe.scheduler = kind(shift=2.0)
        pipe.save_pretrained(tmp_path / kind.__name__)
        back = quiet(LDMPipeline.from_pretrained(tmp_path / kind.__name__))
        assert (type(back.scheduler), back.scheduler.config) == (kind, pipe.scheduler.config)
        drawn = [one(1, seeded(), num_inference_steps=3, output_type="latent").images for one in (pipe, back)]
        assert torch.equal(*drawn)
        with pytest.raises(ValueError, match=r"eta is 0\.5, but FlowMatch\w+ has none"):
            back(1, seeded(), 0.5, num_inference_steps=3)
        with pytest.raises(Exception, match="ldm_lab"):
            diffusers.LDMPipeline.from_pretrained(tmp_path / kind.__name__)

"""One sampler in the place of another: what they share, and that they solve the same equation."""

import math

import pytest
import torch

from ldm_lab.diffusion.ddim import DDIMScheduler
from ldm_lab.diffusion.ddpm import DDPMScheduler
from ldm_lab.diffusion.dpm_solver import DPMSolverMultistepScheduler
from ldm_lab.diffusion.flow import is_flow
from ldm_lab.diffusion.samplers import SAMPLERS, choose

LATENTS = {"beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195, "clip_sample": False}
COMPVIS = {**LATENTS, "set_alpha_to_one": False, "steps_offset": 1}
DIFFUSIONS = [name for name, kind in SAMPLERS.items() if not is_flow(kind)]
VARIANCE = 0.05  # of the data, N(0, VARIANCE), that the analytic model knows


def solve(scheduler, steps, x, **options):
    """Run the sampler with a perfect network."""
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        alpha_bar = float(scheduler.alphas_cumprod.double()[t])
        epsilon = math.sqrt(1 - alpha_bar) * x / (alpha_bar * VARIANCE + 1 - alpha_bar)
        x = scheduler.step(epsilon, t, x, **options).prev_sample
    return x


def exact(model):
    """What the ODE takes 1.0 at the last timestep to, at the noise level that the chain of `model` ends at."""
    end, start = float(model.final_alpha_cumprod), float(model.alphas_cumprod.double()[-1])
    return math.sqrt((end * VARIANCE + 1 - end) / (start * VARIANCE + 1 - start))


MODELS = [
    DDIMScheduler(**LATENTS),
    DDIMScheduler(**LATENTS, timestep_spacing="trailing"),
    DDIMScheduler(**COMPVIS),
    DDPMScheduler(**LATENTS),
    DPMSolverMultistepScheduler.from_config(LATENTS),
    DPMSolverMultistepScheduler.from_config(LATENTS, final_sigmas_type="sigma_min"),
]


def error(name, model, steps):
    x = solve(choose(name, model), steps, torch.ones(1, 1, 1, 1, dtype=torch.float64))
    return abs(float(x) / exact(model) - 1)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", ["ddim", "dpm_solver"])
def test_all_come_to_the_solution_at_the_noise_level_of_the_model(model, name):
    assert error(name, model, 499) < 0.05
    assert error(name, model, 499) < error(name, model, 5) / 5


@pytest.mark.parametrize("model", MODELS[:4])
def test_ten_steps_of_dpm_solver_are_better_than_a_hundred_of_ddim(model):
    assert error("dpm_solver", model, 10) < error("ddim", model, 100)


@pytest.mark.parametrize("name", ["ddim", "dpm_solver"])
def test_the_chain_ends_at_the_noise_level_of_the_model(name):
    ends = [float(model.final_alpha_cumprod) for model in MODELS]
    assert len(set(ends)) == 2
    assert [float(choose(name, model).final_alpha_cumprod) for model in MODELS] == ends


@pytest.mark.parametrize("model", MODELS[:3])
def test_ancestral_sampling_comes_to_the_variance_of_the_data(model):
    """All 1000 steps, also where the model's own timesteps have an offset."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(20_000, 1, 1, 1, generator=generator, dtype=torch.float64)
    x = solve(choose("ddpm", model), 1000, noise, generator=generator)
    assert float(x.var()) == pytest.approx(VARIANCE, rel=0.12)  # a step a timestep is not quite enough


@pytest.mark.parametrize("name", DIFFUSIONS)
@pytest.mark.parametrize(
    "settings",
    [
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
        {"trained_betas": [0.01, 0.02, 0.03], "num_train_timesteps": 3, "prediction_type": "sample"},
        {"thresholding": True, "sample_max_value": 2.0, "dynamic_thresholding_ratio": 0.9, "clip_sample": False},
    ],
)
def test_what_the_network_was_trained_with_is_kept(name, settings):
    model = DDIMScheduler(**settings)
    sampler = choose(name, model)
    assert type(sampler) is SAMPLERS[name]
    assert torch.equal(sampler.alphas_cumprod, model.alphas_cumprod)
    for key, value in settings.items():
        if key in sampler.config:
            assert sampler.config[key] == value


def test_the_same_kind_keeps_its_own_settings_and_no_state():
    class Mine(DDIMScheduler):
        pass

    for model in (DDIMScheduler(**COMPVIS), Mine(**COMPVIS), DPMSolverMultistepScheduler(solver_order=3)):
        model.set_timesteps(5)
        name = "ddim" if isinstance(model, DDIMScheduler) else "dpm_solver"
        sampler = choose(name, model)
        assert (type(sampler), sampler.config) == (type(model), model.config)
        assert sampler.num_inference_steps is None


def test_the_timesteps_of_another_kind_are_its_own():
    for name, first, last in (("ddpm", 950, 0), ("dpm_solver", 999, 1)):
        sampler = choose(name, DDIMScheduler(**COMPVIS))
        sampler.set_timesteps(20)
        assert (int(sampler.timesteps[0]), int(sampler.timesteps[-1])) == (first, last)
    assert choose("ddpm", DDIMScheduler(timestep_spacing="trailing")).config.timestep_spacing == "trailing"


def test_latents_are_not_clipped_behind_a_sampler_that_cannot_clip():
    solver = DPMSolverMultistepScheduler.from_config(LATENTS)
    for name in ("ddim", "ddpm"):
        assert choose(name, solver).config.clip_sample is False
        assert choose(name, DDIMScheduler(clip_sample=True, clip_sample_range=2.0)).config.clip_sample_range == 2.0


def test_there_and_back_is_the_same():
    for model in (DDIMScheduler(**LATENTS), DDIMScheduler(**LATENTS, timestep_spacing="trailing")):
        for name in DIFFUSIONS:
            assert choose("ddim", choose(name, model)).config == model.config


@pytest.mark.parametrize(
    ("name", "eta", "message"),
    [
        ("euler", 0.0, "sampler=euler: there are ddim, ddpm, dpm_solver, flow_euler, flow_heun"),
        ("ddpm", 0.5, "sampler.eta=0.5: ddpm has none; use sampler=ddim or sampler.eta=0"),
        ("dpm_solver", 1.0, "sampler.eta=1.0: dpm_solver has none; use sampler=ddim or sampler.eta=0"),
    ],
)
def test_what_there_is_not_is_refused(name, eta, message):
    with pytest.raises(ValueError) as error:
        choose(name, DDIMScheduler(), eta)
    assert str(error.value) == message

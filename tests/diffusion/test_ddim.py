import inspect
import random

import pytest
import torch

from ldm_lab.diffusion.ddim import DDIMScheduler
from ldm_lab.diffusion.ddpm import DDPMScheduler
from ldm_lab.diffusion.parameterization import PARAMETERIZATIONS
from ldm_lab.diffusion.schedules import make_betas
from ldm_lab.diffusion.spacing import SPACINGS
from tests.diffusion.golden import COMPVIS, compvis, diffusers_meta, diffusers_tensors, recorded_schedule
from tests.helpers import assert_close_relative


@pytest.mark.parametrize("case", diffusers_meta()["scheduler_cases"], ids=lambda case: str(case["index"]))
def test_recorded_step_of_diffusers(case):
    recorded = diffusers_tensors()
    scheduler = DDIMScheduler.from_config(case["config"])
    scheduler.set_timesteps(case["num_inference_steps"])
    arguments = {
        "model_output": recorded["sched.model_output"],
        "timestep": case["timestep"],
        "sample": recorded["sched.sample"],
        "eta": case["eta"],
        "variance_noise": recorded["sched.variance_noise"] if case["eta"] > 0 else None,
        **case["step_kwargs"],
    }
    as_recorded = {**arguments, "prev_timestep": case["prev_timestep_used"]}
    at_zero_snr = scheduler.alphas_cumprod[case["timestep"]] == 0
    if at_zero_snr and scheduler.config.prediction_type == "epsilon":
        for refused in (arguments, as_recorded):
            with pytest.raises(ValueError, match="zero terminal SNR"):
                scheduler.step(**refused)
        return
    assert case["finite_prev"]
    assert case["finite_x0"]
    result = scheduler.step(**as_recorded)
    assert_close_relative(result.prev_sample, recorded["sched.prev_sample"][case["index"]], 1e-5)
    assert_close_relative(result.pred_original_sample, recorded["sched.pred_original_sample"][case["index"]], 1e-5)

    following = scheduler.previous_timestep(case["timestep"])
    if "next_timestep_in_list" in case:
        listed = case["next_timestep_in_list"]
        assert following == (-1 if listed is None else listed)
    if following == max(case["prev_timestep_used"], -1):
        assert torch.equal(scheduler.step(**arguments).prev_sample, result.prev_sample)


def test_what_was_recorded_as_not_finite_is_what_is_refused():
    """Clipping turns the infinite x0 of the namesake into a finite one, which is no better."""
    for case in diffusers_meta()["scheduler_cases"]:
        if not (case["finite_prev"] and case["finite_x0"]):
            scheduler = DDIMScheduler.from_config(case["config"])
            assert scheduler.alphas_cumprod[case["timestep"]] == 0
            assert scheduler.config.prediction_type == "epsilon"


@pytest.mark.parametrize("eta", [0, 1])
def test_recorded_trajectory_of_compvis(eta):
    """All ten steps; the noise that the network predicted follows from the recorded x_t and x0."""
    io = compvis("io")
    scheduler = DDIMScheduler(**recorded_schedule())
    scheduler.set_timesteps(10)
    states, x0s = io[f"ddim10.eta{eta}.x"], io[f"ddim10.eta{eta}.pred_x0"]
    assert torch.equal(states[0], io["in.ddim_xT"])
    for step, t in enumerate(scheduler.timesteps):
        alpha, sigma = (rate.double() for rate in scheduler.rates(t, states[step]))
        epsilon = ((states[step] - alpha * x0s[step + 1]) / sigma).float()
        noise = io["in.ddim_eta1_noise"][step] if eta else None
        result = scheduler.step(epsilon, t, states[step], eta=float(eta), variance_noise=noise)
        assert_close_relative(result.prev_sample, states[step + 1], 1e-5)
        assert_close_relative(result.pred_original_sample, x0s[step + 1], 1e-4)
    assert torch.equal(states[-1], io[f"ddim10.eta{eta}.final"])


def noise_levels(scheduler, eta):
    """ᾱ, ᾱ_prev and σ of every step, in rising order, read off steps on unit vectors."""
    zero, one = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    rows = []
    for t in scheduler.timesteps.flip(0):
        prev, x0 = (value.item() for value in scheduler.step(zero, t, one).to_tuple())  # √(ᾱ_prev / ᾱ) and 1 / √ᾱ
        sigma = scheduler.step(zero, t, zero, eta=eta, variance_noise=one).prev_sample.item()
        rows.append((x0**-2, (prev / x0) ** 2, sigma))
    return torch.tensor(rows, dtype=torch.float64).unbind(1)


# By the number of steps asked of it; where that is no divisor of T, the original does another number.
@pytest.mark.parametrize(("asked", "done"), [(n, n) for n in (1, 10, 50, 100, 200, 250, 500)] + [(400, 500)])
def test_noise_levels_of_compvis(asked, done):
    recorded = compvis("schedule")
    scheduler = DDIMScheduler(**COMPVIS)
    scheduler.set_timesteps(done)
    assert scheduler.timesteps.flip(0).tolist() == recorded[f"ddim.timesteps.{asked}"].tolist()
    for eta in (0, 1):
        alphas, alphas_prev, sigmas = noise_levels(scheduler, float(eta))
        assert_close_relative(alphas, recorded[f"ddim.alphas.{asked}"], 1e-6)
        assert_close_relative(alphas_prev, recorded[f"ddim.alphas_prev.{asked}"], 1e-6)
        assert_close_relative(sigmas, recorded[f"ddim.sigmas.{asked}.eta{eta}"], 1e-5)


@pytest.mark.parametrize("eta", [0, 1])
def test_noise_levels_of_the_recorded_trajectories(eta):
    io, scheduler = compvis("io"), DDIMScheduler(**recorded_schedule())
    scheduler.set_timesteps(10)
    alphas, alphas_prev, sigmas = noise_levels(scheduler, float(eta))
    assert_close_relative(alphas, io[f"ddim10.eta{eta}.ddim_alphas"], 1e-6)
    assert_close_relative(alphas_prev, io[f"ddim10.eta{eta}.ddim_alphas_prev"], 1e-6)
    assert_close_relative((1 - alphas).sqrt(), io[f"ddim10.eta{eta}.ddim_sqrt_one_minus_alphas"], 1e-6)
    assert_close_relative(sigmas, io[f"ddim10.eta{eta}.ddim_sigmas"], 1e-5)


@pytest.mark.parametrize("count", [1, 7, 300, 1000])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_eta_one_is_ancestral_sampling(spacing, count):
    settings = {"clip_sample": False, "timestep_spacing": spacing}
    ddim, ddpm = DDIMScheduler(**settings), DDPMScheduler(**settings, variance_type="fixed_small")
    ddim.set_timesteps(count)
    ddpm.set_timesteps(count)
    x, epsilon, noise = torch.randn(3, 1, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind()
    for t in ddim.timesteps[:: 1 + count // 100]:
        ours = ddim.step(epsilon, t, x, eta=1.0, variance_noise=noise).prev_sample
        ancestral = ddpm.step(epsilon, t, x, variance_noise=noise).prev_sample
        torch.testing.assert_close(ours, ancestral, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_a_step_goes_to_the_next_timestep_of_the_list(spacing):
    scheduler = DDIMScheduler(timestep_spacing=spacing, clip_sample=False)
    scheduler.set_timesteps(7)
    x, epsilon = torch.randn(2, 1, 5).unbind()
    timesteps = scheduler.timesteps.tolist()
    for t, earlier in zip(timesteps, [*timesteps[1:], -1], strict=True):
        implied = scheduler.step(epsilon, t, x).prev_sample
        assert torch.equal(implied, scheduler.step(epsilon, t, x, prev_timestep=earlier).prev_sample)
    assert torch.equal(implied, scheduler.step(epsilon, t, x).pred_original_sample)  # the last one ends at x0


@pytest.mark.parametrize("count", [1, 7, 50, 300, 1000])
def test_whole_chain_equals_diffusers(count):
    diffusers = pytest.importorskip("diffusers")
    settings = {**COMPVIS, "steps_offset": 0}
    ours, theirs = DDIMScheduler(**settings), diffusers.DDIMScheduler(**settings)
    ours.set_timesteps(count)
    theirs.set_timesteps(count)
    x = y = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    mine, other = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    for t in ours.timesteps:
        x = ours.step(torch.sin(x), t, x, eta=0.5, generator=mine).prev_sample
        y = theirs.step(torch.sin(y), t, y, eta=0.5, generator=other).prev_sample
    assert_close_relative(x, y, 1e-4)
    assert torch.equal(mine.get_state(), other.get_state())


def some_settings(draw):
    """Options that all go with one another."""
    total = draw.choice([40, 250, 1000])
    return {
        "num_train_timesteps": total,
        "beta_schedule": draw.choice(["linear", "scaled_linear", "squaredcos_cap_v2"]),
        "trained_betas": draw.choice([None, [0.002 + 0.05 * i / total for i in range(total)]]),
        "clip_sample": draw.choice([True, False]),
        "clip_sample_range": draw.choice([0.5, 1.0, 3.0]),
        "set_alpha_to_one": draw.choice([True, False]),
        "steps_offset": draw.choice([0, 1]),
        "thresholding": draw.choice([True, False]),
        "dynamic_thresholding_ratio": draw.choice([0.5, 0.9, 0.995]),
        "sample_max_value": draw.choice([1.0, 2.0]),
    }


def in_double_precision(scheduler, settings):
    """The namesake with its tables in double precision; those of single precision are compared elsewhere."""
    keys = inspect.signature(make_betas).parameters.keys() & settings.keys()
    betas = make_betas(beta_start=1e-4, beta_end=0.02, **{key: settings[key] for key in keys})
    scheduler.alphas_cumprod = (1 - betas).cumprod(0)
    scheduler.final_alpha_cumprod = torch.tensor(1.0) if settings["set_alpha_to_one"] else scheduler.alphas_cumprod[0]
    return scheduler


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction_type", PARAMETERIZATIONS)
def test_steps_of_any_settings_equal_diffusers(prediction_type, spacing, zero_snr):
    """To the earlier timestep that the namesake goes to."""
    diffusers = pytest.importorskip("diffusers")
    draw = random.Random(f"{prediction_type} {spacing} {zero_snr}")
    tensors = torch.randn(3, 2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x, output, noise = tensors.unbind()
    fixed = {"prediction_type": prediction_type, "timestep_spacing": spacing, "rescale_betas_zero_snr": zero_snr}
    for _ in range(12):
        settings = {**some_settings(draw), **fixed}
        # Not 1: at zero SNR nothing is left for ε then, and the namesake may take the root of less than nothing.
        step = {"eta": draw.choice([0.0, 0.4, 0.9]), "use_clipped_model_output": draw.choice([True, False])}
        ours, theirs = DDIMScheduler(**settings), in_double_precision(diffusers.DDIMScheduler(**settings), settings)
        count = draw.randrange(1, 30)
        ours.set_timesteps(count)
        theirs.set_timesteps(count)
        for t in ours.timesteps.tolist():
            if ours.alphas_cumprod[t] == 0 and prediction_type == "epsilon":
                continue  # refused: see test_scheduler
            expected = theirs.step(output, t, x, **step, variance_noise=noise if step["eta"] else None)
            actual = ours.step(output, t, x, **step, variance_noise=noise, prev_timestep=t - len(ours) // count)
            assert_close_relative(actual.prev_sample, expected.prev_sample, 1e-9)
            assert_close_relative(actual.pred_original_sample, expected.pred_original_sample, 1e-9)


def test_the_generator_governs_the_noise():
    scheduler, x = DDIMScheduler(clip_sample=False), torch.randn(3, 2, 4)
    scheduler.set_timesteps(10)

    def step(generator, sample=x, eta=1.0):
        return scheduler.step(sample, 900, sample, eta=eta, generator=generator).prev_sample

    seeded = [torch.Generator().manual_seed(5).get_state(), torch.Generator().manual_seed(5)]
    first = step(seeded[1])
    assert not torch.equal(seeded[0], seeded[1].get_state())
    assert torch.equal(first, step(torch.Generator().manual_seed(5)))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    step(torch.Generator().manual_seed(6))
    assert torch.equal(before, torch.get_rng_state())

    each = step([torch.Generator().manual_seed(i) for i in range(3)])
    alone = step([torch.Generator().manual_seed(1)], x[1:2])
    torch.testing.assert_close(each[1:2], alone, rtol=0, atol=0)
    with pytest.raises(ValueError, match="generator: 2 given for a batch of 3"):
        step([torch.Generator(), torch.Generator()])


def test_without_eta_nothing_is_drawn():
    scheduler, x = DDIMScheduler(), torch.randn(1, 2)
    scheduler.set_timesteps(10)
    generator = torch.Generator().manual_seed(5)
    before = generator.get_state()
    scheduler.step(x, 900, x, eta=0.0, generator=generator)
    assert torch.equal(before, generator.get_state())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_steps_are_computed_in_single(dtype):
    scheduler = DDIMScheduler(**COMPVIS)
    scheduler.set_timesteps(10)
    x, epsilon = torch.randn(2, 2, 8, generator=torch.Generator().manual_seed(0)).to(dtype).unbind()
    for t in scheduler.timesteps:
        half = scheduler.step(epsilon, t, x, eta=1.0, generator=torch.Generator().manual_seed(1))
        full = scheduler.step(epsilon.float(), t, x.float(), eta=1.0, generator=torch.Generator().manual_seed(1))
        assert half.prev_sample.dtype == half.pred_original_sample.dtype == dtype
        assert torch.equal(half.prev_sample, full.prev_sample.to(dtype))


@pytest.mark.parametrize("eta", [-0.1, "1", None, float("nan")])
def test_eta_must_be_a_number_from_zero_on(eta):
    scheduler, x = DDIMScheduler(), torch.zeros(1, 2)
    scheduler.set_timesteps(10)
    with pytest.raises(ValueError, match="eta="):
        scheduler.step(x, 900, x, eta=eta)


def test_more_noise_than_there_is_room_for_is_refused():
    scheduler, x = DDIMScheduler(), torch.zeros(1, 2)
    scheduler.set_timesteps(10)
    with pytest.raises(ValueError, match=r"eta=5\.0 .* smaller"):
        scheduler.step(x, 900, x, eta=5.0)


def test_set_alpha_to_one_decides_where_the_chain_ends():
    clean, noisy = DDIMScheduler(), DDIMScheduler(set_alpha_to_one=False)
    assert clean.final_alpha_cumprod == 1
    assert noisy.final_alpha_cumprod == noisy.alphas_cumprod[0]
    with pytest.raises(ValueError, match="set_alpha_to_one='no'"):
        DDIMScheduler(set_alpha_to_one="no")

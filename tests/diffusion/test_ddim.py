import pytest
import torch

from ldm_lab.diffusion.ddim import DDIMScheduler
from ldm_lab.diffusion.ddpm import DDPMScheduler
from tests.diffusion.golden import COMPVIS, compvis, diffusers_meta, diffusers_tensors
from tests.helpers import assert_close_relative


@pytest.mark.parametrize("case", diffusers_meta()["scheduler_cases"], ids=lambda case: str(case["index"]))
def test_recorded_step_of_diffusers(case):
    recorded = diffusers_tensors()
    scheduler = DDIMScheduler.from_config(case["config"])
    noise = recorded["sched.variance_noise"] if case["eta"] > 0 else None
    arguments = {
        "model_output": recorded["sched.model_output"],
        "timestep": case["timestep"],
        "sample": recorded["sched.sample"],
        "eta": case["eta"],
        "variance_noise": noise,
        "prev_timestep": case["prev_timestep_used"],
        **case["step_kwargs"],
    }
    at_zero_snr = scheduler.alphas_cumprod[case["timestep"]] == 0
    if at_zero_snr and scheduler.config.prediction_type == "epsilon":
        with pytest.raises(ValueError, match="zero terminal SNR"):
            scheduler.step(**arguments)
        return
    assert case["finite_prev"]
    assert case["finite_x0"]
    result = scheduler.step(**arguments)
    # The recorded values were computed with a product of float32 factors, which shows where ᾱ is small.
    assert_close_relative(result.prev_sample, recorded["sched.prev_sample"][case["index"]], 2e-5)
    assert_close_relative(result.pred_original_sample, recorded["sched.pred_original_sample"][case["index"]], 2e-5)


@pytest.mark.parametrize("eta", [0, 1])
def test_recorded_trajectory_of_compvis(eta):
    """All ten steps; the noise that the network predicted follows from the recorded x_t and x0."""
    io = compvis("io")
    scheduler = DDIMScheduler(**COMPVIS)
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


@pytest.mark.parametrize("count", [1, 10, 50, 100, 200, 250, 500])
def test_noise_levels_of_compvis(count):
    """ᾱ, ᾱ_prev and σ of every step, read off a step on unit vectors."""
    recorded = compvis("schedule")
    scheduler = DDIMScheduler(**COMPVIS)
    scheduler.set_timesteps(count)
    zero, one = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    for index, t in zip(reversed(range(count)), scheduler.timesteps, strict=True):
        x0_per_x = scheduler.step(zero, t, one).pred_original_sample.item()
        prev_per_x = scheduler.step(zero, t, one).prev_sample.item()
        alpha_bar, alpha_bar_prev = x0_per_x**-2, (prev_per_x / x0_per_x) ** 2
        sigma = scheduler.step(zero, t, zero, eta=1.0, variance_noise=one).prev_sample.item()
        assert alpha_bar == pytest.approx(recorded[f"ddim.alphas.{count}"][index].item(), rel=1e-6)
        assert alpha_bar_prev == pytest.approx(recorded[f"ddim.alphas_prev.{count}"][index].item(), rel=1e-6)
        assert sigma == pytest.approx(recorded[f"ddim.sigmas.{count}.eta1"][index].item(), rel=1e-3, abs=1e-6)


def test_eta_one_through_all_timesteps_is_ancestral_sampling():
    ddim, ddpm = DDIMScheduler(clip_sample=False), DDPMScheduler(clip_sample=False, variance_type="fixed_small")
    ddim.set_timesteps(1000)
    ddpm.set_timesteps(1000)
    x, epsilon, noise = torch.randn(3, 1, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind()
    for t in range(1000):
        ours = ddim.step(epsilon, t, x, eta=1.0, variance_noise=noise).prev_sample
        ancestral = ddpm.step(epsilon, t, x, variance_noise=noise).prev_sample
        torch.testing.assert_close(ours, ancestral, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("spacing", ["trailing", "linspace", "leading"])
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

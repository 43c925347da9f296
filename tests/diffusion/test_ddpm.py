import pytest
import torch

from ldm_lab.diffusion.ddpm import VARIANCES, DDPMScheduler
from ldm_lab.diffusion.parameterization import PARAMETERIZATIONS
from tests.diffusion.golden import compvis
from tests.helpers import assert_close_relative

PUBLISHED = {"beta_start": 0.0015, "beta_end": 0.0195, "beta_schedule": "scaled_linear"}


@pytest.mark.parametrize("count", [5, 50, 333, 1000])
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_small_log", "fixed_large"])
@pytest.mark.parametrize("prediction_type", PARAMETERIZATIONS)
def test_whole_chain_equals_diffusers(prediction_type, variance_type, count):
    diffusers = pytest.importorskip("diffusers")
    settings = {**PUBLISHED, "prediction_type": prediction_type, "variance_type": variance_type, "clip_sample": True}
    ours, theirs = DDPMScheduler(**settings), diffusers.DDPMScheduler(**settings)
    ours.set_timesteps(count)
    theirs.set_timesteps(count)
    x = y = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    mine, other = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    timesteps = ours.timesteps if count < 1000 else ours.timesteps[:100]
    for t in timesteps:
        x = ours.step(torch.sin(x), t, x, generator=mine).prev_sample
        y = theirs.step(torch.sin(y), t, y, generator=other).prev_sample
    assert_close_relative(x, y, 1e-4)
    assert torch.equal(mine.get_state(), other.get_state())


@pytest.mark.parametrize("options", [{"thresholding": True, "sample_max_value": 2.0}, {"clip_sample_range": 0.5}])
def test_limits_on_x0_equal_diffusers(options):
    diffusers = pytest.importorskip("diffusers")
    ours, theirs = DDPMScheduler(**PUBLISHED, **options), diffusers.DDPMScheduler(**PUBLISHED, **options)
    ours.set_timesteps(timesteps=[900, 250, 30])
    theirs.set_timesteps(timesteps=[900, 250, 30])
    x, epsilon = torch.randn(2, 2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).unbind()
    for t in (900, 250):
        mine = ours.step(epsilon, t, x, generator=torch.Generator().manual_seed(2))
        other = theirs.step(epsilon, t, x, generator=torch.Generator().manual_seed(2))
        assert_close_relative(mine.prev_sample, other.prev_sample, 1e-5)
        assert_close_relative(mine.pred_original_sample, other.pred_original_sample, 1e-5)


def test_the_posterior_at_every_timestep_is_that_of_compvis():
    """The weights of x0, x_t and the noise, read off steps on unit vectors."""
    scheduler = DDPMScheduler(**PUBLISHED, prediction_type="sample", clip_sample=False)
    scheduler.set_timesteps(1000)
    steps = []
    for x0, x_t, noise in torch.eye(3, dtype=torch.float64).reshape(3, 3, 1, 1):
        steps.append([scheduler.step(x0, t, x_t, variance_noise=noise).prev_sample.item() for t in range(1000)])
    weight_x0, weight_x_t, deviation = torch.tensor(steps, dtype=torch.float64)
    recorded = {key.removeprefix("celebahq."): value for key, value in compvis("schedule").items()}
    assert_close_relative(weight_x0, recorded["posterior_mean_coef1"], 1e-6)
    assert_close_relative(weight_x_t, recorded["posterior_mean_coef2"], 1e-6)
    variance = deviation.square()
    assert_close_relative(variance, recorded["posterior_variance"], 1e-6)
    # At the end there is no noise; the original says 1e-20 for the sake of the logarithm.
    assert_close_relative(variance.clamp(min=1e-20).log(), recorded["posterior_log_variance_clipped"], 1e-6)
    weights = scheduler.betas[1:] ** 2 / (2 * variance * scheduler.alphas * (1 - scheduler.alphas_cumprod))[1:]
    assert_close_relative(weights, recorded["lvlb_weights"][1:], 1e-4)


def test_posterior_of_a_gaussian_follows_from_bayes():
    """Mean and variance of x_prev given x_t and x0, for timesteps far apart, by combining two Gaussians."""
    scheduler = DDPMScheduler(clip_sample=False, prediction_type="sample")
    scheduler.set_timesteps(timesteps=[700, 200])
    late, early = scheduler.alphas_cumprod[700].double(), scheduler.alphas_cumprod[200].double()
    x_t, x0 = torch.tensor([[1.3]], dtype=torch.float64), torch.tensor([[-0.4]], dtype=torch.float64)
    alpha = late / early
    # prior x_prev ~ N(√ᾱ_prev x0, 1 - ᾱ_prev); likelihood x_t ~ N(√α x_prev, 1 - α)
    precision = 1 / (1 - early) + alpha / (1 - alpha)
    mean = (early.sqrt() * x0 / (1 - early) + alpha.sqrt() * x_t / (1 - alpha)) / precision
    zero, one = torch.zeros_like(x_t), torch.ones_like(x_t)
    ours = scheduler.step(x0, 700, x_t, variance_noise=zero).prev_sample
    spread = scheduler.step(x0, 700, x_t, variance_noise=one).prev_sample - ours
    torch.testing.assert_close(ours, mean, rtol=1e-5, atol=0)
    torch.testing.assert_close(spread.square(), (1 / precision).reshape(1, 1), rtol=1e-5, atol=0)


def test_large_variance_exceeds_small_variance():
    for t, earlier in ((0.2, 0.5), (0.01, 0.9), (0.98, 0.99)):
        assert VARIANCES["fixed_large"](t, earlier) > VARIANCES["fixed_small"](t, earlier) > 0


@pytest.mark.parametrize("variance_type", VARIANCES)
def test_the_last_step_adds_no_noise(variance_type):
    scheduler = DDPMScheduler(variance_type=variance_type, timestep_spacing="trailing")
    scheduler.set_timesteps(4)
    x = torch.randn(2, 3)
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    result = scheduler.step(x, scheduler.timesteps[-1], x, generator=generator)
    torch.testing.assert_close(result.prev_sample, result.pred_original_sample)
    assert torch.equal(before, generator.get_state())
    assert scheduler.step(x, 999, x, generator=generator).prev_sample.isfinite().all()
    assert not torch.equal(before, generator.get_state())


def test_each_sample_has_its_own_generator():
    scheduler, x = DDPMScheduler(clip_sample=False), torch.randn(3, 4)
    scheduler.set_timesteps(10)
    each = scheduler.step(x, 900, x, generator=[torch.Generator().manual_seed(i) for i in range(3)]).prev_sample
    alone = scheduler.step(x[2:], 900, x[2:], generator=torch.Generator().manual_seed(2)).prev_sample
    assert torch.equal(each[2:], alone)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_steps_are_computed_in_single(dtype):
    scheduler = DDPMScheduler(**PUBLISHED)
    scheduler.set_timesteps(10)
    x = torch.randn(2, 8).to(dtype)
    half = scheduler.step(x, 900, x, generator=torch.Generator().manual_seed(1)).prev_sample
    full = scheduler.step(x.float(), 900, x.float(), generator=torch.Generator().manual_seed(1)).prev_sample
    assert half.dtype == dtype
    assert torch.equal(half, full.to(dtype))


@pytest.mark.parametrize("variance_type", ["learned", "learned_range", "big"])
def test_other_variances_are_refused(variance_type):
    with pytest.raises(ValueError, match=f"variance_type='{variance_type}' .* 'fixed_small'"):
        DDPMScheduler(variance_type=variance_type)

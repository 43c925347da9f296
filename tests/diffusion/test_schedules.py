import pytest
import torch

from ldm_lab.diffusion.ddim import DDIMScheduler
from ldm_lab.diffusion.schedules import BETA_SCHEDULES, make_betas, rescale_zero_terminal_snr, scaled_linear
from tests.diffusion.golden import COMPVIS, compvis, diffusers_tensors
from tests.helpers import assert_close_relative


@pytest.mark.parametrize(("name", "beta_end"), [("celebahq", 0.0195), ("churches", 0.0155)])
def test_betas_equal_those_of_compvis_in_double_precision(name, beta_end):
    betas = scaled_linear(1000, 0.0015, beta_end)
    torch.testing.assert_close(betas, compvis("schedule")[f"{name}.betas_float64"], rtol=1e-13, atol=0)


def test_tables_equal_the_buffers_of_compvis():
    recorded = compvis("schedule")
    scheduler = DDIMScheduler(**COMPVIS)
    alpha, sigma = scheduler.rates(torch.arange(1000), torch.zeros(1000))
    tables = {
        "betas": scheduler.betas,
        "alphas_cumprod": scheduler.alphas_cumprod,
        "sqrt_alphas_cumprod": alpha,
        "sqrt_one_minus_alphas_cumprod": sigma,
        "sqrt_recip_alphas_cumprod": 1 / alpha,
        "sqrt_recipm1_alphas_cumprod": sigma / alpha,
        # One minus ᾱ cancels at both ends: from the betas, in double precision.
        "log_one_minus_alphas_cumprod": (1 - (1 - scaled_linear(1000, 0.0015, 0.0195)).cumprod(0)).log().float(),
    }
    for key, table in tables.items():
        assert table.dtype == torch.float32
        torch.testing.assert_close(table, recorded[f"celebahq.{key}"], rtol=1e-6, atol=0, msg=key)


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("name", BETA_SCHEDULES)
def test_alphas_cumprod_equal_those_of_diffusers(name, zero_snr):
    recorded = diffusers_tensors()[f"alphas_cumprod.{name}.zsnr{int(zero_snr)}"]
    betas = {"beta_start": 0.0015, "beta_end": 0.0195} if name == "scaled_linear" else {}
    scheduler = DDIMScheduler(beta_schedule=name, rescale_betas_zero_snr=zero_snr, **betas)
    assert_close_relative(scheduler.alphas_cumprod, recorded, 1e-6)


@pytest.mark.parametrize("name", BETA_SCHEDULES)
def test_zero_terminal_snr_ends_in_pure_noise_and_keeps_the_first_timestep(name):
    betas = BETA_SCHEDULES[name](1000, 1e-4, 0.02)
    rescaled = rescale_zero_terminal_snr(betas)
    alpha_bar = torch.cumprod(1 - rescaled, 0)
    assert alpha_bar[-1] == 0
    assert alpha_bar[0] == pytest.approx(1 - betas[0].item(), rel=1e-12)
    assert (alpha_bar.diff() < 0).all()
    torch.testing.assert_close(rescale_zero_terminal_snr(rescaled), rescaled, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", BETA_SCHEDULES)
def test_betas_are_valid_for_short_and_long_schedules(name):
    for count in (1, 2, 10, 4000):
        betas = make_betas(name, count, 1e-4, 0.02)
        assert betas.shape == (count,)
        assert betas.dtype == torch.float64
        assert ((betas > 0) & (betas < 1)).all()


def test_trained_betas_take_the_place_of_the_schedule():
    betas = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    torch.testing.assert_close(make_betas("linear", 5, 1e-4, 0.02, betas.tolist()), betas, rtol=0, atol=0)
    DDIMScheduler(num_train_timesteps=2, trained_betas=[0.5, 1.0])  # pure noise at the last timestep is allowed


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta_schedule": "cosine"}, "beta_schedule='cosine' .* 'linear' or 'scaled_linear' or 'squaredcos_cap_v2'"),
        ({"beta_schedule": ["linear"]}, "beta_schedule"),
        ({"num_train_timesteps": 0}, "num_train_timesteps=0"),
        ({"num_train_timesteps": 10.5}, "num_train_timesteps=10.5"),
        ({"num_train_timesteps": True}, "num_train_timesteps=True"),
        ({"beta_start": 0.0}, "beta_start=0.0"),
        ({"beta_end": 1.5}, "beta_end=1.5"),
        ({"beta_end": "0.02"}, "beta_end='0.02'"),
        ({"beta_end": float("nan")}, "beta_end=nan"),
        ({"trained_betas": []}, r"trained_betas=\[\] is not allowed"),
        ({"trained_betas": [0.1, -0.2, 0.3], "num_train_timesteps": 3}, r"trained_betas\[1\]=-0.2"),
        ({"trained_betas": [0.1, 1.0, 0.3], "num_train_timesteps": 3}, r"trained_betas\[1\]=1.0"),
        ({"trained_betas": [float("nan")], "num_train_timesteps": 1}, r"trained_betas\[0\]=nan"),
        ({"trained_betas": 0.1}, "trained_betas must be a list"),
        ({"trained_betas": ["a"]}, "trained_betas must be a list"),
        ({"rescale_betas_zero_snr": True, "num_train_timesteps": 1}, "num_train_timesteps=1"),
        ({"rescale_betas_zero_snr": "no"}, "rescale_betas_zero_snr='no'"),
    ],
)
def test_a_wrong_setting_is_one_line_that_names_it(settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        DDIMScheduler(**settings)
    assert "\n" not in str(caught.value)

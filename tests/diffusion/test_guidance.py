"""Autoguidance: the combination of two predictions is that of their denoised samples, where and when it should act."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ldm_lab.diffusion.ddim import DDIMScheduler
from ldm_lab.diffusion.denoising import denoise
from ldm_lab.diffusion.dpm_solver import DPMSolverMultistepScheduler
from ldm_lab.diffusion.guidance import Converted, Guidance, GuidedModel, guided, noise_level
from ldm_lab.diffusion.parameterization import PARAMETERIZATIONS
from ldm_lab.diffusion.samplers import SAMPLERS, choose

LATENTS = {"beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195, "clip_sample": False}
TYPES = list(PARAMETERIZATIONS)


class Mixture(nn.Module):
    """The best network for data at +-1 in each of the coordinates, widened to a standard deviation of `width`.

    The posterior mean of a mixture of N(1, s^2) and N(-1, s^2) at x_t = alpha x0 + sigma eps: with v = alpha^2 s^2 +
    sigma^2, E[x0 | x_t] = m + (alpha s^2 / v) (x_t - alpha m), m = tanh(alpha x_t / v) averaged over both.
    """

    dtype = torch.float32
    config = SimpleNamespace(in_channels=1, out_channels=1, sample_size=2)

    def __init__(self, scheduler, width, kind=None):
        super().__init__()
        self.scheduler, self.variance, self.calls = scheduler, width**2, []
        self.kind = PARAMETERIZATIONS[kind or scheduler.config.prediction_type]

    def x0(self, x, alpha, sigma):
        total = alpha**2 * self.variance + sigma**2
        mean = torch.tanh(alpha * x / total)
        return mean + alpha * self.variance / total * (x - alpha * mean)

    def forward(self, x, t):
        self.calls.append(int(t))
        alpha_bar = float(self.scheduler.alphas_cumprod[int(t)])
        alpha, sigma = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
        x0 = self.x0(x, alpha, sigma)
        epsilon = (x - alpha * x0) / sigma
        return SimpleNamespace(sample=self.kind.target(x0, epsilon, alpha, sigma))


DIFFUSION = [name for name in SAMPLERS if not name.startswith("flow")]


def models(kind="epsilon", guide_kind=None, **settings):
    scheduler = DDIMScheduler(prediction_type=kind, **{**LATENTS, **settings})
    return scheduler, Mixture(scheduler, 0.1), Mixture(scheduler, 0.4, guide_kind)


def latents(count=4):
    return torch.randn(count, 1, 2, 2, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("t", [20, 500, 999])
@pytest.mark.parametrize("kind", TYPES)
def test_the_prediction_is_that_of_the_combined_denoised_samples(kind, t):
    scheduler, main, guide = models(kind)
    x, time = latents(), torch.tensor([t] * 4)
    predictions = [network(x, torch.tensor(t)).sample for network in (main, guide)]
    d_main, d_guide = (scheduler.predict_x0(prediction, time, x) for prediction in predictions)
    for w in (0.0, 0.5, 2.0, 3.7):
        prediction = GuidedModel(main, guide, scheduler, Guidance(w))(x, torch.tensor(t)).sample
        found = scheduler.predict_x0(prediction, time, x)
        torch.testing.assert_close(found, d_guide + w * (d_main - d_guide), rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize("t", [20, 500, 999])
@pytest.mark.parametrize("theirs", TYPES)
@pytest.mark.parametrize("kind", TYPES)
def test_a_guide_of_another_type_says_the_same(kind, theirs, t):
    scheduler, _, guide = models(kind)
    x, time = latents(), torch.tensor(t)
    own = DDIMScheduler.from_config(scheduler.config, prediction_type=theirs)
    converted = Converted(Mixture(own, 0.4), own, scheduler.parameterization)
    assert (converted.dtype, converted.config) == (torch.float32, guide.config)
    torch.testing.assert_close(converted(x, time).sample, guide(x, time).sample, rtol=1e-4, atol=5e-5)


def test_noise_says_nothing_at_pure_noise():
    scheduler = DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="epsilon", timestep_spacing="trailing")
    with pytest.raises(ValueError, match=r"^a guide with prediction_type=epsilon says nothing of x0 at the last"):
        Converted(nn.Identity(), scheduler, PARAMETERIZATIONS["v_prediction"])
    v = DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing")
    converted = Converted(Mixture(v, 0.4), v, PARAMETERIZATIONS["sample"])
    assert torch.equal(converted(latents(), torch.tensor(999)).sample, torch.zeros(4, 1, 2, 2))  # the data's mean


def test_at_scale_one_it_is_the_network_itself():
    scheduler, main, guide = models()
    assert guided(main, guide, scheduler, Guidance()) is main
    assert guided(main, None, scheduler, Guidance(1.0, [0.2, 5])) is main
    with pytest.raises(ValueError, match=r"^guidance_scale=2: there is no guide; .*guidance_scale=1$"):
        guided(main, None, scheduler, Guidance(2.0))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"scale": -1}, "guidance_scale=-1: must be a number, at least 0"),
        ({"scale": math.nan}, "guidance_scale=nan: "),
        ({"scale": math.inf}, "guidance_scale=inf: "),
        ({"scale": "2"}, "guidance_scale='2': "),
        ({"interval": [5, 0.2]}, r"guidance_interval=\[5, 0\.2\]: must be two rising noise levels"),
        ({"interval": [1, 1]}, "guidance_interval="),
        ({"interval": [-1, 1]}, "guidance_interval="),
        ({"interval": [0.2]}, "guidance_interval="),
        ({"interval": [0, math.nan]}, "guidance_interval="),
        ({"interval": 5}, "guidance_interval=5"),
        ({"interval": "15"}, "guidance_interval='15'"),
    ],
)
def test_settings_that_cannot_be_are_refused(given, message):
    with pytest.raises(ValueError, match=f"^{message}") as error:
        Guidance(**given)
    assert "\n" not in str(error.value)


def test_other_digits_are_another_name():
    assert Guidance(2, [0.2, 5]).slug == Guidance(2.0, (0.2, 5.0)).slug == "guided2_0.2_5"
    assert Guidance(2.0000001).slug != Guidance(2).slug == "guided2"


# The interval.


@pytest.mark.parametrize("name", DIFFUSION)
def test_the_guide_is_evaluated_within_the_interval_alone(name):
    model, main, guide = models()
    scheduler, interval = choose(name, model), Guidance(2.0, [0.3, 4.0])
    scheduler.set_timesteps(25)
    for _ in denoise(guided(main, guide, scheduler, interval), scheduler, latents()):
        pass
    levels = {t: math.sqrt(1 / float(model.alphas_cumprod[t]) - 1) for t in main.calls}
    assert len(main.calls) == 25
    assert guide.calls == [t for t in main.calls if 0.3 < levels[t] <= 4.0]
    assert 0 < len(guide.calls) == interval.evaluations(scheduler) < 25
    assert (Guidance(2.0).evaluations(scheduler), Guidance(1.0).evaluations(scheduler)) == (25, 0)


def test_nothing_changes_where_the_interval_holds_no_step():
    scheduler, main, guide = models()
    scheduler.set_timesteps(10)
    plain, never = (
        [output.prev_sample for _, output in denoise(network, scheduler, latents())][-1]
        for network in (main, guided(main, guide, scheduler, Guidance(3.0, [1e3, 1e4])))
    )
    assert torch.equal(plain, never)
    assert guide.calls == []


def test_the_level_of_a_timestep():
    scheduler = DDIMScheduler(**LATENTS)
    ends = [noise_level(scheduler, t) for t in (10, 10.5, 11)]
    assert ends == sorted(ends)
    assert ends[0] == pytest.approx(math.sqrt(1 / float(scheduler.alphas_cumprod[10]) - 1))
    zero_snr = DDIMScheduler(rescale_betas_zero_snr=True)
    assert noise_level(zero_snr, 999) == math.inf
    straight = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    assert [noise_level(straight, t) for t in (0, 500, 1000)] == [0, 1, math.inf]


@pytest.mark.parametrize("kind", ["EulerDiscreteScheduler", "HeunDiscreteScheduler", "PNDMScheduler"])
def test_schedulers_of_diffusers_are_guided_too(kind):
    diffusers = pytest.importorskip("diffusers")
    model, main, guide = models()
    scheduler = getattr(diffusers, kind).from_config(dict(model.config))
    scheduler.set_timesteps(10)
    network = guided(main, guide, scheduler, Guidance(2.0, [0.3, 4.0]))
    for _, output in denoise(network, scheduler, latents() * scheduler.init_noise_sigma):
        found = output.prev_sample
    assert found.isfinite().all()
    assert 0 < len(guide.calls) == network.guidance.evaluations(scheduler) < len(main.calls)


# What it does.


@pytest.mark.parametrize("name", DIFFUSION)
def test_guidance_leads_samples_away_from_the_guides_errors(name):
    """The guide knows the two modes as too wide: w > 1 brings samples nearer to them than the main network does."""
    model, main, guide = models()
    scheduler, noise = choose(name, model), latents(500)
    scheduler.set_timesteps(50)
    spreads = []
    for w in (0.0, 1.0, 1.5):
        network, generator = guided(main, guide, scheduler, Guidance(w)), torch.Generator().manual_seed(1)
        final = [output.prev_sample for _, output in denoise(network, scheduler, noise, generator)][-1]
        spreads.append(float(final.abs().std()))
        assert 0.4 < float((final > 0).float().mean()) < 0.6  # neither mode is lost
    assert spreads[2] < 0.75 * spreads[1] < 0.25 * spreads[0]

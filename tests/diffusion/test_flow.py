"""Flow matching: the straight path, its samplers, its times of training; and what goes with no diffusion."""

import copy
import math
import pickle

import pytest
import torch

from ldm_lab.diffusion.ddim import DDIMScheduler
from ldm_lab.diffusion.flow_euler import FlowMatchEulerDiscreteScheduler as Euler
from ldm_lab.diffusion.flow_heun import FlowMatchHeunDiscreteScheduler as Heun
from ldm_lab.diffusion.objective import DenoisingObjective, L2Loss, MinSNRWeighting, PlainWeighting
from ldm_lab.diffusion.samplers import choose
from ldm_lab.diffusion.timesteps import LogitNormalTimesteps, LowDiscrepancyTimesteps
from tests.helpers import assert_close_relative

BOTH = pytest.mark.parametrize("kind", [Euler, Heun])


def odd(x, t):
    """A velocity that is no linear function of x."""
    return torch.sin(3 * x + t / 300) - 0.3 * x


def run(scheduler, x, network=odd, **options):
    """All steps from `x`, after `set_timesteps`."""
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t), t, x, **options).prev_sample
    return x


def start(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --- as the namesakes


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.43])
@BOTH
def test_steps_equal_those_of_the_namesake(kind, shift):
    theirs_kind = getattr(pytest.importorskip("diffusers"), kind.__name__)
    ours, theirs, x = kind(shift=shift), theirs_kind(shift=shift), start(2, 3)
    if kind is Euler:  # before the number of steps is known, all levels
        assert_close_relative(ours.timesteps, theirs.timesteps, 1e-6)
    for count in range(1, 51):
        ours.set_timesteps(2 * count - 1 if kind is Heun else count)  # diffusers counts levels
        theirs.set_timesteps(count)
        assert_close_relative(ours.timesteps, theirs.timesteps, 1e-6)
        # The Heun of diffusers divides differences of float32 by small levels.
        assert_close_relative(run(ours, x), run(theirs, x), 3e-4 if kind is Heun else 1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"use_karras_sigmas": True},
        {"use_exponential_sigmas": True, "shift": 2.0},
        {"use_beta_sigmas": True},
        {"shift_terminal": 0.1, "shift": 3.0},
        {"shift_terminal": 0.02, "use_karras_sigmas": True},
        {"stochastic_sampling": True},
        {"num_train_timesteps": 100, "shift": 1.5},
    ],
)
def test_settings_are_those_of_the_namesake(settings):
    theirs_kind = pytest.importorskip("diffusers").FlowMatchEulerDiscreteScheduler
    for count in (2, 7, 50):
        ours, theirs, x = Euler(**settings), theirs_kind(**settings), start(2, 3)
        ours.set_timesteps(count)
        theirs.set_timesteps(count)
        assert_close_relative(ours.sigmas, theirs.sigmas, 1e-5)
        found = [run(one, x, generator=torch.Generator().manual_seed(1)) for one in (ours, theirs)]
        assert_close_relative(*found, 1e-5)
    for one in (ours, theirs):
        one.set_timesteps(sigmas=[1.0, 0.5, 0.25])
    assert_close_relative(ours.sigmas, theirs.sigmas, 1e-5)
    noised = [one.scale_noise(x, one.timesteps[[0, 2]], torch.ones_like(x)) for one in (ours, theirs)]
    assert_close_relative(*noised, 1e-5)


@BOTH
def test_files_are_those_of_the_namesake(kind, tmp_path):
    theirs_kind = getattr(pytest.importorskip("diffusers"), kind.__name__)
    theirs_kind(shift=3.0).save_pretrained(tmp_path / "theirs")
    ours = kind.from_pretrained(tmp_path / "theirs")
    assert (ours.config.shift, len(ours)) == (3.0, 1000)
    ours.save_pretrained(tmp_path / "ours")
    theirs = theirs_kind.from_pretrained(tmp_path / "ours")
    assert {key: theirs.config[key] for key in ours.config} == ours.config
    assert kind.from_config(theirs.config).config == ours.config


# --- a mixture of two Gaussians with the known velocity

MEANS, STD = torch.tensor([[1.0, 0.5], [-0.6, -0.9]], dtype=torch.float64), 0.3


def velocity(x, t):
    """E[ε - x0 | x_t = x] of the mixture, `(N, 2)`, float64."""
    t = float(t) / 1000
    variance = (1 - t) ** 2 * STD**2 + t**2
    off = x[:, None] - (1 - t) * MEANS  # (N, 2 parts, 2)
    belongs = torch.softmax(-off.square().sum(-1) / (2 * variance), dim=1)[..., None]
    each = (t - (1 - t) * STD**2) / variance * off - MEANS
    return (belongs * each).sum(1)


@BOTH
def test_samples_have_the_mean_and_covariance_of_the_data(kind):
    scheduler = kind()
    scheduler.set_timesteps(100)
    samples = run(scheduler, start(20_000, 2, dtype=torch.float64), velocity)
    covariance = torch.cov(MEANS.T, correction=0) + STD**2 * torch.eye(2, dtype=torch.float64)
    assert torch.allclose(samples.mean(0), MEANS.mean(0), atol=0.03)
    assert torch.allclose(torch.cov(samples.T), covariance, atol=0.04)


def test_stochastic_steps_come_to_it_too():
    scheduler, generator = Euler(stochastic_sampling=True), torch.Generator().manual_seed(1)
    scheduler.set_timesteps(200)
    samples = run(scheduler, start(10_000, 2, dtype=torch.float64), velocity, generator=generator)
    assert torch.allclose(samples.mean(0), MEANS.mean(0), atol=0.05)
    assert torch.allclose(samples.var(0), MEANS.var(0, correction=0) + STD**2, atol=0.08)


@pytest.mark.parametrize(("kind", "counts", "order"), [(Euler, (20, 40), 1), (Heun, (39, 79), 2), (Heun, (40, 80), 2)])
def test_errors_fall_with_the_order_of_the_solver(kind, counts, order):
    x = start(200, 2, dtype=torch.float64)
    solver = Heun()
    solver.set_timesteps(999)
    exact, errors = run(solver, x, velocity), []
    for count in counts:
        scheduler = kind()
        scheduler.set_timesteps(count)
        errors.append(float((run(scheduler, x, velocity) - exact).norm()))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.3)


# --- steps


@BOTH
def test_a_perfect_prediction_gives_back_x0_in_every_step(kind):
    x0, noise, scheduler = start(2, 3), start(2, 3, seed=1), kind(shift=2.0)
    for count in (1, 2, 5, 6):
        scheduler.set_timesteps(count)
        assert len(scheduler.timesteps) == scheduler.num_inference_steps == count
        x = noise
        for t in scheduler.timesteps:
            output = scheduler.step(noise - x0, t, x)
            assert torch.allclose(output.pred_original_sample, x0, atol=1e-5)
            x = output.prev_sample
        assert torch.allclose(x, x0, atol=1e-5)


@BOTH
def test_a_chain_may_begin_at_any_timestep(kind):
    """As variations of an image do: with the last of the timesteps."""
    x0, noise, scheduler = start(2, 3), start(2, 3, seed=1), kind(shift=3.0)
    for count in (10, 11):
        for left in (1, 2, 5, 10):
            scheduler.set_timesteps(count)
            scheduler.set_timesteps(timesteps=scheduler.timesteps[-left:].tolist())
            x = scheduler.add_noise(x0, noise, scheduler.timesteps[:1].expand(2))
            assert torch.allclose(run(scheduler, x, lambda *_: noise - x0), x0, atol=1e-5)
    scheduler.set_timesteps(9)
    whole = run(scheduler, noise)
    scheduler.step(noise, scheduler.timesteps[0], noise)  # a chain that is left, and a new one
    assert torch.equal(run(scheduler, noise), whole)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(scheduler)))
    assert torch.equal(run(twin, noise), whole)


@BOTH
def test_half_precision_is_computed_in_single(kind):
    scheduler, x = kind(), start(2, 3).bfloat16()
    scheduler.set_timesteps(3)
    output = scheduler.step(x, scheduler.timesteps[0], x)
    assert output.prev_sample.dtype == output.pred_original_sample.dtype == torch.bfloat16
    wanted = x.float() + float(scheduler.sigmas[1] - 1) * x.float()
    assert torch.equal(output.prev_sample, wanted.bfloat16())


def test_heun_refuses_a_step_out_of_order():
    scheduler, x = Heun(), start(2, 3)
    scheduler.set_timesteps(7)
    scheduler.step(x, scheduler.timesteps[0], x)
    with pytest.raises(ValueError, match=r"^timestep=1, but 667 is due: Heun's steps have two halves$"):
        scheduler.step(x, scheduler.timesteps[-1], x)


# --- training


def test_training_goes_from_data_to_noise_on_a_straight_line():
    scheduler, x0, noise = Euler(), start(3, 2, 4, 4), start(3, 2, 4, 4, seed=1)
    t = torch.tensor([0.0, 250.5, 1000.0])
    fraction = (t / 1000)[:, None, None, None]
    x_t = scheduler.add_noise(x0, noise, t)
    assert torch.allclose(x_t, (1 - fraction) * x0 + fraction * noise)
    target = scheduler.get_target(x0, noise, t)
    assert torch.equal(target, noise - x0)
    assert torch.allclose(scheduler.predict_x0(target, t, x_t), x0, atol=1e-6)
    assert scheduler.snr(t).tolist() == pytest.approx([math.inf, (749.5 / 250.5) ** 2, 0.0])
    with pytest.raises(ValueError, match=r"^timesteps=\[0.0, 1000.5\]"):
        scheduler.add_noise(x0[:2], noise[:2], torch.tensor([0.0, 1000.5]))


@pytest.mark.parametrize("weighting", [PlainWeighting(), MinSNRWeighting(gamma=5.0)])
def test_the_loss_is_the_weighted_error_of_the_velocity(weighting):
    objective = DenoisingObjective(Euler(), L2Loss(), weighting, LogitNormalTimesteps())
    x0, noise = start(4, 2, 4, 4), start(4, 2, 4, 4, seed=1)
    t = torch.tensor([0.0, 100.0, 900.5, 1000.0])
    losses = objective(lambda x, _: noise - x0 + 0.5, x0, noise, t)
    snr = [math.inf, 81.0, (99.5 / 900.5) ** 2, 0.0]
    if isinstance(weighting, MinSNRWeighting):  # min(SNR, 5) times the error of x0, which is t² times that of v
        expected = [0.25 * w for w in (0.0, 5 * 0.01, snr[2] * 0.9005**2, 1.0)]
    else:
        expected = [0.25] * 4
    assert losses.tolist() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("mean", "std", "shift"), [(0.0, 1.0, 1.0), (-0.5, 1.2, 1.0), (0.0, 1.0, 1.73)])
def test_times_are_logit_normal_and_shifted(mean, std, shift):
    """The shift by s of sigmoid(n) is sigmoid(n + log s)."""
    objective = DenoisingObjective(Euler(shift=shift), L2Loss(), PlainWeighting(), LogitNormalTimesteps(mean, std))
    t = objective.draw_timesteps(0, range(8192), 64)
    assert t.dtype == torch.float32
    assert float(t.min()) >= 0
    assert float(t.max()) <= 1000
    normal = torch.logit(t.double() / 1000)
    assert float(normal.mean()) == pytest.approx(mean + math.log(shift), abs=0.01)
    assert float(normal.std()) == pytest.approx(std, abs=0.02)
    below = (t < 1000 * torch.sigmoid(torch.tensor(mean + math.log(shift) - std))).double().mean()
    assert float(below) == pytest.approx(0.1587, abs=0.01)  # one standard deviation below the mean


def test_times_depend_on_seed_and_position_alone():
    draw = DenoisingObjective(Euler(shift=2.0), L2Loss(), PlainWeighting(), LogitNormalTimesteps()).draw_timesteps
    whole, before = draw(3, range(24), 8), torch.get_rng_state()
    shuffled = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    assert torch.equal(draw(3, shuffled, 8), whole[shuffled])
    assert torch.cat([draw(3, [position], 8) for position in range(24)]).equal(whole)
    assert not torch.equal(draw(4, range(24), 8), whole)
    assert torch.equal(before, torch.get_rng_state())


def test_a_diffusion_takes_logit_normal_times_at_whole_timesteps():
    draw = DenoisingObjective(DDIMScheduler(), L2Loss(), PlainWeighting(), LogitNormalTimesteps(std=9.0)).draw_timesteps
    t = draw(0, range(2000), 8)
    assert (t.dtype, int(t.min()), int(t.max())) == (torch.int64, 0, 999)
    plain = DenoisingObjective(DDIMScheduler(), L2Loss(), PlainWeighting(), LowDiscrepancyTimesteps())
    assert torch.equal(plain.draw_timesteps(0, range(16), 8), LowDiscrepancyTimesteps()(0, range(16), 8, 1000))


@BOTH
def test_the_shift_follows_from_the_size_of_the_latents(kind):
    scheduler = kind(shift="latents")
    with pytest.raises(ValueError, match=r"^shift='latents': a number is set when training begins"):
        scheduler.set_timesteps(5)
    scheduler.fit((3, 64, 64))
    assert scheduler.config.shift == pytest.approx(1.73, abs=0.003)
    assert kind.from_config(scheduler.config).config == scheduler.config
    fixed = kind(shift=2.0)
    fixed.fit((3, 64, 64))
    assert fixed.config.shift == 2.0


# --- what is refused


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("shift", 0.0), ("shift", "image"), ("num_train_timesteps", 0), ("use_dynamic_shifting", True),
        ("invert_sigmas", True), ("shift_terminal", 1.0), ("use_karras_sigmas", 1), ("stochastic_sampling", "no"),
        ("time_shift_type", "square"),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_named(key, value):
    with pytest.raises(ValueError, match=rf"^{key}={value!r} is not (allowed|supported)") as error:
        Euler(**{key: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "needs one of num_inference_steps, sigmas and timesteps"),
        ({"num_inference_steps": 5, "sigmas": [1.0]}, "needs one of"),
        ({"num_inference_steps": 0}, "num_inference_steps=0"),
        ({"num_inference_steps": 5, "mu": 1.0}, "mu=1.0: the shift does not depend on the image"),
        ({"sigmas": [0.5, 1.0]}, r"sigmas=\[0.5, 1.0\]"),
        ({"timesteps": [1500.0, 1.0]}, r"timesteps=\[1500.0, 1.0\]"),
    ],
)
def test_wrong_levels_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Euler().set_timesteps(**arguments)


def test_samplers_of_the_other_process_are_refused():
    flow, ddim = Euler(shift=2.0, use_karras_sigmas=True), DDIMScheduler()
    for name in ("ddim", "ddpm", "dpm_solver"):
        with pytest.raises(ValueError) as error:
            choose(name, flow)
        said = f"sampler={name}: the model was trained by flow matching; use sampler=flow_euler or flow_heun"
        assert str(error.value) == said
    with pytest.raises(ValueError) as error:
        choose("flow_heun", ddim)
    said = "the model was trained as a diffusion, not by flow matching; use sampler=ddim, ddpm or dpm_solver"
    assert str(error.value) == f"sampler=flow_heun: {said}"
    with pytest.raises(ValueError) as error:
        choose("flow_euler", flow, 0.5)
    assert str(error.value) == "sampler.eta=0.5: flow_euler has none; use sampler.eta=0"
    with pytest.raises(ValueError, match="cannot be built from the config of"):
        Euler.from_config(ddim.config)
    assert type(choose("flow_heun", flow)) is Heun
    assert choose("flow_heun", flow).config.shift == 2.0
    assert choose("flow_euler", flow).config == flow.config
    assert choose("flow_euler", choose("flow_heun", flow)).config.shift == 2.0

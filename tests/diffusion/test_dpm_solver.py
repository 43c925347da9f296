"""DPM-Solver++ against its namesake, against an analytic model, and in its limits."""

import math

import pytest
import torch

from ldm_lab.diffusion.ddim import DDIMScheduler
from ldm_lab.diffusion.dpm_solver import DPMSolverMultistepScheduler
from ldm_lab.untrusted import LoadError
from tests.helpers import assert_close_relative

LATENTS = {"beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195}
VARIANCE = 0.3  # of the data in the analytic model


def predicted(scheduler, x, t):
    """What a perfect network says of data that is N(0, VARIANCE), by `prediction_type`."""
    alpha_bar = scheduler.alphas_cumprod.double()[int(t)]
    alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    x0 = alpha * VARIANCE * x / (alpha_bar * VARIANCE + 1 - alpha_bar)
    epsilon = (x - alpha * x0) / sigma
    kinds = {"epsilon": epsilon, "sample": x0, "v_prediction": alpha * epsilon - sigma * x0}
    return kinds[scheduler.config.prediction_type]


def odd(x, t):
    """A network that is no perfect one: nothing cancels."""
    return torch.sin(3 * x + float(t) / 300) + 0.1 * x


def solve(scheduler, steps, network=odd, noise=False, dtype=torch.float64):
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 4, 4, generator=generator, dtype=dtype)
    path = []
    for t in scheduler.timesteps:
        more = {"variance_noise": torch.randn(x.shape, generator=generator, dtype=dtype)} if noise else {}
        x = scheduler.step(network(x, t), t, x, **more).prev_sample
        path.append(x)
    return torch.stack(path)


SETTINGS = [
    {"solver_order": order, "solver_type": kind, "timestep_spacing": spacing}
    for order in (1, 2, 3)
    for kind in ("midpoint", "heun")
    for spacing in ("linspace", "leading", "trailing")
]
MORE = [
    {"prediction_type": "v_prediction"},
    {"prediction_type": "sample", "solver_order": 3},
    {"final_sigmas_type": "sigma_min"},
    {"lower_order_final": False},
    {"euler_at_final": True, "final_sigmas_type": "sigma_min"},
    {"timestep_spacing": "leading", "steps_offset": 1},
    {"thresholding": True, "sample_max_value": 1.5},
    {"trained_betas": [0.01, 0.02, 0.03, 0.05] * 10, "num_train_timesteps": 40},
]


@pytest.mark.parametrize("steps", [1, 2, 6, 14, 15, 20])
@pytest.mark.parametrize("settings", SETTINGS + MORE, ids=str)
def test_the_ode_is_solved_as_the_namesake_does(settings, steps):
    diffusers = pytest.importorskip("diffusers")
    settings = {**LATENTS, **settings}
    ours, theirs = (kind(**settings) for kind in (DPMSolverMultistepScheduler, diffusers.DPMSolverMultistepScheduler))
    theirs.set_timesteps(steps)
    ours.set_timesteps(steps)
    assert ours.timesteps.tolist() == theirs.timesteps.tolist()
    # Its coefficients are float32, and epsilon at T is divided by an α of 0.01.
    assert_close_relative(solve(ours, steps, dtype=torch.float32), solve(theirs, steps, dtype=torch.float32), 1e-4)


@pytest.mark.parametrize("steps", [1, 6, 20])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("kind", ["midpoint", "heun"])
def test_the_sde_is_solved_as_the_namesake_does(order, kind, steps):
    diffusers = pytest.importorskip("diffusers")
    settings = {**LATENTS, "solver_order": order, "solver_type": kind, "prediction_type": "v_prediction"}
    settings["algorithm_type"] = "sde-dpmsolver++"
    ours, theirs = (kind(**settings) for kind in (DPMSolverMultistepScheduler, diffusers.DPMSolverMultistepScheduler))
    mine = solve(ours, steps, noise=True, dtype=torch.float32)
    assert_close_relative(mine, solve(theirs, steps, noise=True, dtype=torch.float32), 1e-4)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_errors_fall_with_the_order_of_the_solver(prediction_type):
    """Twice the steps: half, a quarter, an eighth of the error, where steps are equal in λ.

    Of T = 1000 timesteps there are too few for that: here are more of them, with the same noise levels.
    """
    errors, total = {}, 20_000
    fine = {key: value * 1000 / total for key, value in LATENTS.items() if key != "beta_schedule"}
    settings = {**LATENTS, **fine, "num_train_timesteps": total, "final_sigmas_type": "sigma_min"}
    for order in (1, 2, 3):
        for steps in (32, 128):
            scheduler = DPMSolverMultistepScheduler(**settings, solver_order=order, prediction_type=prediction_type)
            levels = torch.log(scheduler.alphas_cumprod.double() / (1 - scheduler.alphas_cumprod.double())) / 2
            wanted = torch.linspace(levels[-1], levels[total // 10], steps + 1, dtype=torch.float64)
            chosen = sorted({int((levels - level).abs().argmin()) for level in wanted}, reverse=True)
            scheduler.set_timesteps(timesteps=chosen)
            x = torch.ones(1, 1, 1, 1, dtype=torch.float64)
            for t in chosen[:-1]:
                x = scheduler.step(predicted(scheduler, x, t), t, x).prev_sample
            first, last = (scheduler.alphas_cumprod.double()[t] for t in (chosen[0], chosen[-1]))
            exact = math.sqrt((last * VARIANCE + 1 - last) / (first * VARIANCE + 1 - first))
            errors[order, steps] = abs(float(x) - exact)
    for order in (1, 2, 3):
        rate = math.log2(errors[order, 32] / errors[order, 128]) / 2
        assert rate > order - 0.1, (order, rate)
    assert errors[3, 32] < errors[2, 32] < errors[1, 32]


@pytest.mark.parametrize("order", [1, 2, 3])
def test_more_steps_of_the_sde_come_closer_to_the_variance_of_the_data(order):
    """With order 3 the namesake does not: the 0.5 in its last weight has the wrong sign and does not vanish."""
    errors = []
    for steps in (40, 160):
        scheduler = DPMSolverMultistepScheduler(
            **LATENTS, solver_order=order, algorithm_type="sde-dpmsolver++", final_sigmas_type="sigma_min"
        )
        scheduler.set_timesteps(steps)
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(20_000, 1, 1, 1, generator=generator, dtype=torch.float64)
        for t in scheduler.timesteps:
            x = scheduler.step(predicted(scheduler, x, t), t, x, generator=generator).prev_sample
        last = float(scheduler.alphas_cumprod[0])
        errors.append(abs(float(x.var()) - (last * VARIANCE + 1 - last)))
    assert errors[1] < errors[0] / 2
    assert errors[1] < 0.1


def test_pure_noise_at_the_start_is_taken_exactly():
    """The namesake puts 2^-24 in its place."""
    settings = {**LATENTS, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    solver = DPMSolverMultistepScheduler(**settings, timestep_spacing="trailing", solver_order=3)
    solver.set_timesteps(300)
    x = start = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    for t in solver.timesteps:
        x = solver.step(predicted(solver, x, t), t, x).prev_sample
    assert float(x) == pytest.approx(float(start) * math.sqrt(VARIANCE), rel=0.02)
    solver = DPMSolverMultistepScheduler(**{**settings, "prediction_type": "epsilon"}, timestep_spacing="trailing")
    solver.set_timesteps(5)
    with pytest.raises(ValueError, match="says nothing of x0 at timestep 999"):
        solver.step(start, 999, start)


def test_order_1_without_noise_is_ddim():
    solver, ddim = DPMSolverMultistepScheduler(**LATENTS, solver_order=1), DDIMScheduler(**LATENTS, clip_sample=False)
    timesteps = [901, 650, 320, 40]
    results = []
    for scheduler in (solver, ddim):
        scheduler.set_timesteps(timesteps=timesteps)
        x = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(1, 3, 2, 2)
        for t in timesteps:
            x = scheduler.step(odd(x, t), t, x).prev_sample
        results.append(x)
    assert_close_relative(*results, 1e-9)


@pytest.mark.parametrize("algorithm", ["dpmsolver++", "sde-dpmsolver++"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_a_chain_that_visits_timestep_0_ends_there_if_it_ends_with_its_noise(order, algorithm):
    scheduler = DPMSolverMultistepScheduler(
        **LATENTS, solver_order=order, algorithm_type=algorithm, final_sigmas_type="sigma_min"
    )
    scheduler.set_timesteps(timesteps=[*range(950, 0, -50), 0])
    x = torch.linspace(-1, 1, 12).reshape(1, 3, 2, 2)
    for t in scheduler.timesteps:
        before, x = x, scheduler.step(odd(x, t), t, x).prev_sample
    assert torch.equal(x, before)


def test_steps_are_taken_in_their_order_and_a_new_start_forgets():
    scheduler = DPMSolverMultistepScheduler(**LATENTS)
    once = solve(scheduler, 6)
    assert torch.equal(solve(scheduler, 6), once)
    x = torch.zeros(1, 3, 2, 2)
    scheduler.step(x, scheduler.timesteps[0], x)
    with pytest.raises(ValueError, match=f"^timestep={scheduler.timesteps[2]}, but {scheduler.timesteps[1]} is due"):
        scheduler.step(x, scheduler.timesteps[2], x)


@pytest.mark.parametrize(
    ("key", "value"),
    [("solver_order", 4), ("algorithm_type", "dpmsolver"), ("solver_type", "euler"), ("final_sigmas_type", "one")],
)
def test_what_it_does_not_know_is_refused(key, value):
    with pytest.raises(ValueError, match=f"^{key}="):
        DPMSolverMultistepScheduler(**{key: value})


@pytest.mark.parametrize(("key", "value"), [("use_karras_sigmas", True), ("lambda_min_clipped", -5.1)])
def test_levels_of_the_namesake_that_it_does_not_have_are_refused(key, value):
    config = {"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": False, "lambda_min_clipped": -math.inf}
    DPMSolverMultistepScheduler.from_config(config)
    with pytest.raises(LoadError, match=f"{key}={value} is not supported"):
        DPMSolverMultistepScheduler.from_config({**config, key: value})


def test_it_is_built_from_the_config_of_another_sampler_and_back():
    ddim = DDIMScheduler(**LATENTS, clip_sample=False, prediction_type="v_prediction")
    solver = DPMSolverMultistepScheduler.from_config(ddim.config)
    assert torch.equal(solver.alphas_cumprod, ddim.alphas_cumprod)
    assert solver.config.prediction_type == "v_prediction"
    assert torch.equal(DDIMScheduler.from_config(solver.config).alphas_cumprod, ddim.alphas_cumprod)


def test_levels_that_are_even_in_log_snr():
    scheduler = DPMSolverMultistepScheduler(**LATENTS, use_lu_lambdas=True)
    scheduler.set_timesteps(20)
    assert (int(scheduler.timesteps[0]), int(scheduler.timesteps[-1])) == (999, 0)
    alpha_bar = scheduler.alphas_cumprod.double()[scheduler.timesteps]
    gaps = (torch.log(alpha_bar / (1 - alpha_bar)) / 2).diff()[:-4]  # near timestep 0 whole timesteps are too coarse
    assert gaps.max() < 1.2 * gaps.min()
    for steps in range(1, 1001, 37):
        scheduler.set_timesteps(steps)
        assert len(scheduler.timesteps) == steps


@pytest.mark.parametrize("steps", [8, 20, 50])
def test_levels_even_in_log_snr_come_to_what_the_namesake_comes_to(steps):
    """It rounds the timestep and not the level; what is left is of the size of that."""
    diffusers = pytest.importorskip("diffusers")
    settings = {**LATENTS, "use_lu_lambdas": True, "prediction_type": "sample"}
    ours, theirs = (kind(**settings) for kind in (DPMSolverMultistepScheduler, diffusers.DPMSolverMultistepScheduler))
    results = []
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(steps)
        x = torch.ones(1, 1, 1, 1)
        for t in scheduler.timesteps:
            x = scheduler.step(predicted(scheduler, x, t).float(), t, x).prev_sample
        results.append(float(x))
    assert ours.timesteps[:5].tolist() == theirs.timesteps[:5].tolist()
    assert results[0] == pytest.approx(results[1], rel=0.02)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"final_sigmas_type": "sigma_min"},
        {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"},
    ],
)
def test_levels_even_in_log_snr_need_a_tenth_of_the_steps(settings):
    errors = {}
    for even in (False, True):
        scheduler = DPMSolverMultistepScheduler(**LATENTS, **settings, use_lu_lambdas=even)
        scheduler.set_timesteps(12 if even else 120)
        x = torch.ones(1, 1, 1, 1, dtype=torch.float64)
        for t in scheduler.timesteps:
            x = scheduler.step(predicted(scheduler, x, t), t, x).prev_sample
        start, end = float(scheduler.alphas_cumprod[-1]), float(scheduler.final_alpha_cumprod)
        errors[even] = abs(float(x) / math.sqrt((end * VARIANCE + 1 - end) / (start * VARIANCE + 1 - start)) - 1)
    assert errors[True] < errors[False]

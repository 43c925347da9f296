"""DPM-Solver++ against its namesake, against an analytic model, and in its limits."""

import math
import random

import pytest
import torch

from ldm_lab.diffusion.ddim import DDIMScheduler
from ldm_lab.diffusion.dpm_solver import DPMSolverMultistepScheduler
from ldm_lab.utils.reading import LoadError
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
    with pytest.raises(ValueError, match=r"^timestep=3 is not one of the 6 in scheduler\.timesteps"):
        scheduler.step(x, 3, x)
    with pytest.raises(ValueError, match="call set_timesteps"):
        DPMSolverMultistepScheduler().step(x, 999, x)


@pytest.mark.parametrize("start", [1, 4, 9])
def test_a_chain_may_begin_at_any_timestep_as_that_of_the_namesake(start):
    """For what starts from an image with some noise."""
    diffusers = pytest.importorskip("diffusers")
    results = []
    for kind in (DPMSolverMultistepScheduler, diffusers.DPMSolverMultistepScheduler):
        scheduler = kind(**LATENTS, solver_order=3)
        scheduler.set_timesteps(10)
        x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
        for t in scheduler.timesteps[start:]:
            x = scheduler.step(odd(x, t), t, x, return_dict=False)[0]
        results.append(x)
    assert_close_relative(*results, 1e-5)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("solver_order", 4),
        ("algorithm_type", "dpmsolver+"),
        ("solver_type", "euler"),
        ("final_sigmas_type", "one"),
        ("use_karras_sigmas", "yes"),
        ("flow_shift", 0.0),
        ("lambda_min_clipped", math.nan),
        ("lambda_min_clipped", 20.0),
        ("variance_type", "learned_range"),
        ("prediction_type", "flow_prediction"),
    ],
)
def test_what_it_does_not_know_is_refused(key, value):
    with pytest.raises(ValueError, match=f"^{key}="):
        DPMSolverMultistepScheduler(**{key: value})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"algorithm_type": "dpmsolver"}, "final_sigmas_type='zero' .* 'sigma_min' with algorithm_type='dpmsolver'"),
        ({"use_karras_sigmas": True, "use_lu_lambdas": True}, "use_karras_sigmas and use_lu_lambdas=True"),
        ({"use_beta_sigmas": True, "use_exponential_sigmas": True}, "use_exponential_sigmas and use_beta_sigmas=True"),
    ],
)
def test_settings_that_exclude_each_other(settings, message):
    with pytest.raises(ValueError, match=message):
        DPMSolverMultistepScheduler(**settings)


def test_a_shift_by_the_size_of_the_image_is_refused():
    DPMSolverMultistepScheduler.from_config({"use_dynamic_shifting": False})
    with pytest.raises(LoadError, match="use_dynamic_shifting=True is not supported"):
        DPMSolverMultistepScheduler.from_config({"use_dynamic_shifting": True})


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


# Levels between the timesteps, and the other settings of the namesake.

BETWEEN = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_flow_sigmas", None)


def some_settings(draw):
    """Options that go with one another and that the namesake has no fault in."""
    between = draw.choice(BETWEEN)
    noise = between != "use_flow_sigmas" and draw.random() < 0.3  # predictions of noise are integrated
    sde, order = draw.random() < 0.4, draw.choice([1, 2, 3])
    settings = {
        "beta_schedule": draw.choice(["linear", "scaled_linear"]),
        "solver_order": min(order, 2) if sde else order,  # with 3 it has no such SDE, or one with a wrong sign
        "solver_type": draw.choice(["midpoint", "heun", "bh2"]),
        "algorithm_type": ("sde-" if sde else "") + ("dpmsolver" if noise else "dpmsolver++"),
        "final_sigmas_type": "sigma_min" if noise else draw.choice(["zero", "zero", "sigma_min"]),
        "lower_order_final": draw.choice([True, False]),
        "euler_at_final": draw.choice([True, False]),
        "prediction_type": draw.choice(["epsilon", "sample", "v_prediction"]),
        "thresholding": draw.random() < 0.3,
        "dynamic_thresholding_ratio": draw.choice([0.5, 0.9]),
        "sample_max_value": draw.choice([0.5, 1.0, 2.0]),
        "timestep_spacing": draw.choice(["linspace", "leading"]),
        "lambda_min_clipped": draw.choice([-math.inf, -5.1, -3.0, -1.5]),
        "flow_shift": draw.choice([1.0, 3.0]),
    }
    if between is not None:
        # At the last level with sigma_min, a step of no length, the "heun" of the namesake divides by 0.
        ends = {"euler_at_final": True} if settings["final_sigmas_type"] == "sigma_min" else {}
        settings |= {between: True, **ends}
    if between == "use_flow_sigmas":
        settings["prediction_type"] = draw.choice(["flow_prediction", "sample"])
        settings["final_sigmas_type"] = "zero"
    return settings


@pytest.mark.parametrize("seed", range(60))
def test_any_settings_are_solved_as_the_namesake_does(seed):
    diffusers = pytest.importorskip("diffusers")
    draw = random.Random(seed)
    settings, steps = some_settings(draw), draw.choice([1, 2, 5, 14, 15, 23])
    ours, theirs = (kind(**settings) for kind in (DPMSolverMultistepScheduler, diffusers.DPMSolverMultistepScheduler))
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(steps)
    # Rounding decides between two timesteps where a level lies at one: in single precision there, in double here.
    apart = (ours.timesteps - theirs.timesteps).abs()
    assert apart.max() <= (1 if any(settings.get(key) for key in BETWEEN[:-1]) else 0)
    straight = settings.get("use_flow_sigmas")
    levels = [level.sigma if straight else level.sigma / level.alpha for level in ours._levels]
    levels = torch.tensor(levels, dtype=torch.float64)
    assert_close_relative(levels, theirs.sigmas, 1e-5)
    theirs.sigmas = levels  # in double precision: in single its coefficients have four to five digits

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 4, 4, generator=generator)
    by_noise = settings["algorithm_type"].endswith("dpmsolver")  # the difference of large numbers, in one step or two
    for t, other_t in zip(ours.timesteps, theirs.timesteps, strict=True):
        noise, output = torch.randn(x.shape, generator=generator), odd(x, t)
        mine = ours.step(output, t, x, variance_noise=noise).prev_sample
        other = theirs.step(output, other_t, x, variance_noise=noise).prev_sample
        assert_close_relative(mine, other, 1e-4 if by_noise else 1e-5)
        x = mine  # the same for both: the steps are compared, and not what a chain makes of their rounding


@pytest.mark.parametrize("between", BETWEEN[:-1])
@pytest.mark.parametrize("algorithm", ["dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_a_last_step_of_no_length_stays_where_it_is(between, algorithm, order):
    for kind in ("midpoint", "heun"):
        scheduler = DPMSolverMultistepScheduler(
            solver_order=order, solver_type=kind, algorithm_type=algorithm, final_sigmas_type="sigma_min",
            **{between: True}, prediction_type="sample",
        )  # fmt: skip
        for steps in (1, 3, 200):
            assert solve(scheduler, steps).isfinite().all()


@pytest.mark.parametrize("key", BETWEEN[:-1])
def test_levels_between_the_timesteps_take_no_timesteps(key):
    scheduler = DPMSolverMultistepScheduler(**{key: True})
    with pytest.raises(ValueError, match=f"timesteps cannot be given with {key}=True"):
        scheduler.set_timesteps(timesteps=[999, 500])
    for wrong in (0, 1001, None, 2.5):
        with pytest.raises(ValueError, match="num_inference_steps"):
            scheduler.set_timesteps(wrong)
    for steps in (1, 2, 999, 1000):
        scheduler.set_timesteps(steps)
        assert len(scheduler.timesteps) == scheduler.num_inference_steps == steps


def test_pure_noise_is_spread_over_and_its_noise_is_not_integrated():
    settings = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    for key in BETWEEN[:-1]:
        scheduler = DPMSolverMultistepScheduler(**settings, **{key: True})
        assert solve(scheduler, 12).isfinite().all()
    scheduler = DPMSolverMultistepScheduler(
        **settings, algorithm_type="dpmsolver", final_sigmas_type="sigma_min", timestep_spacing="trailing"
    )
    with pytest.raises(ValueError, match="zero terminal SNR"):
        solve(scheduler, 5)


def test_levels_of_a_straight_path_are_for_sampling():
    scheduler, x = (
        DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
        torch.ones(1, 3),
    )
    with pytest.raises(ValueError, match="use_flow_sigmas=True"):
        scheduler.add_noise(x, x, torch.tensor([5]))


def test_a_perfect_flow_leads_to_the_variance_of_the_data():
    scheduler = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", solver_order=2)
    scheduler.set_timesteps(400)
    x = torch.ones(1, 1, dtype=torch.float64)
    for t, level in zip(scheduler.timesteps, scheduler._levels, strict=False):
        x0 = level.alpha * VARIANCE * x / (level.alpha**2 * VARIANCE + level.sigma**2)
        x = scheduler.step((x - x0) / level.sigma, t, x).prev_sample  # v = ε - x0 = (x - x0) / σ
    assert float(x) == pytest.approx(math.sqrt(VARIANCE), rel=0.02)


def test_the_smallest_levels_of_the_cosine_schedule_are_left_out():
    scheduler = DPMSolverMultistepScheduler(beta_schedule="squaredcos_cap_v2", lambda_min_clipped=-5.1)
    alpha_bar = scheduler.alphas_cumprod.double()
    kept = (torch.log(alpha_bar / (1 - alpha_bar)) / 2 >= -5.1).nonzero().max()
    assert kept < 999
    for spacing in ("linspace", "trailing"):
        scheduler = type(scheduler).from_config(scheduler.config, timestep_spacing=spacing)
        for steps in (1, 20, int(kept) + 1):
            scheduler.set_timesteps(steps)
            assert (int(scheduler.timesteps[0]), len(scheduler.timesteps)) == (int(kept), steps)
    with pytest.raises(ValueError, match=f"within 1..{int(kept) + 1}"):
        scheduler.set_timesteps(1000)


def test_a_step_as_a_tuple_is_the_sample_alone_as_in_the_namesake():
    x = torch.ones(1, 3)
    for kind in (DPMSolverMultistepScheduler, pytest.importorskip("diffusers").DPMSolverMultistepScheduler):
        scheduler = kind(**LATENTS)
        scheduler.set_timesteps(3)
        (sample,) = scheduler.step(x, scheduler.timesteps[0], x, return_dict=False)
        assert sample.shape == x.shape

"""What DDIM and DDPM share."""

import pytest
import torch

from ldm_lab.diffusion.broadcast import dynamic_threshold
from ldm_lab.diffusion.ddim import DDIMScheduler
from ldm_lab.diffusion.ddpm import DDPMScheduler
from ldm_lab.diffusion.parameterization import PARAMETERIZATIONS
from ldm_lab.diffusion.spacing import SPACINGS
from tests.diffusion.golden import COMPVIS, compvis, diffusers_meta, diffusers_tensors, recorded_schedule
from tests.helpers import assert_close_relative

BOTH = pytest.mark.parametrize("scheduler_class", [DDIMScheduler, DDPMScheduler])


# The forward process


def test_q_sample_of_compvis():
    io = compvis("io")
    noisy = DDIMScheduler(**recorded_schedule()).add_noise(io["in.q_x0"], io["in.q_noise"], io["in.q_t"])
    assert_close_relative(noisy, io["q_sample"], 1e-6)


@BOTH
def test_add_noise_and_velocity_of_diffusers(scheduler_class):
    recorded, config = diffusers_tensors(), diffusers_meta()["scheduler"]
    scheduler = scheduler_class.from_config(config)
    clean, noise = recorded["sched.sample"], recorded["sched.variance_noise"]
    noisy = scheduler.add_noise(clean, noise, recorded["ddpm.timesteps"])
    velocity = scheduler.get_velocity(clean, noise, recorded["ddpm.timesteps"])
    assert_close_relative(noisy, recorded["ddpm.add_noise"], 1e-5)
    assert_close_relative(velocity, recorded["ddpm.velocity"], 1e-5)


def test_forward_process_has_unit_variance_for_unit_data():
    scheduler = DDIMScheduler()
    alpha, sigma = scheduler.rates(torch.arange(1000), torch.zeros(1000, 1))
    assert alpha.shape == (1000, 1)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(1000, 1))


@pytest.mark.parametrize("prediction_type", PARAMETERIZATIONS)
def test_a_perfect_prediction_gives_back_x0_and_noise(prediction_type):
    scheduler = DDIMScheduler(prediction_type=prediction_type, clip_sample=False)
    x0, noise = torch.randn(2, 6, 3, 4, 4, generator=torch.Generator().manual_seed(0)).unbind()
    t = torch.tensor([0, 1, 200, 500, 900, 999])
    noisy = scheduler.add_noise(x0, noise, t)
    target = scheduler.get_target(x0, noise, t)
    torch.testing.assert_close(scheduler.predict_x0(target, t, noisy), x0, rtol=0, atol=2e-4)
    alpha, sigma = scheduler.rates(t, x0)
    _, epsilon = scheduler.parameterization.x0_and_epsilon(target, noisy, alpha, sigma)
    torch.testing.assert_close(epsilon, noise, rtol=0, atol=2e-4)


@pytest.mark.parametrize("prediction_type", PARAMETERIZATIONS)
def test_error_scale_converts_errors_in_x0(prediction_type):
    parameterization = PARAMETERIZATIONS[prediction_type]
    x_t, prediction, error = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    alpha = torch.tensor(0.3, dtype=torch.float64)
    sigma = (1 - alpha**2).sqrt()
    right, _ = parameterization.x0_and_epsilon(prediction, x_t, alpha, sigma)
    wrong, _ = parameterization.x0_and_epsilon(prediction + error, x_t, alpha, sigma)
    scale = parameterization.error_scale(alpha**2 / sigma**2)
    torch.testing.assert_close(scale * (wrong - right).square().sum(), error.square().sum())


def test_velocity_is_the_target_of_v_prediction():
    scheduler = DDIMScheduler(prediction_type="v_prediction")
    x0, noise = torch.randn(2, 3, 4).unbind()
    t = torch.tensor([1, 500, 999])
    assert torch.equal(scheduler.get_target(x0, noise, t), scheduler.get_velocity(x0, noise, t))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(dtype):
    scheduler = DDIMScheduler(**COMPVIS)
    x0, noise = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0)).to(dtype).unbind()
    t = torch.tensor([0, 10, 500, 999])
    for method in (scheduler.add_noise, scheduler.get_velocity):
        assert torch.equal(method(x0, noise, t), method(x0.float(), noise.float(), t).to(dtype))


def test_one_timestep_for_all_and_one_for_each():
    scheduler = DDIMScheduler()
    x0, noise = torch.randn(2, 3, 2, 4, 4).unbind()
    each = scheduler.add_noise(x0, noise, torch.tensor([7, 7, 7]))
    assert torch.equal(scheduler.add_noise(x0, noise, torch.tensor(7)), each)
    assert torch.equal(scheduler.add_noise(x0, noise, torch.tensor([7])), each)
    with pytest.raises(ValueError, match=r"shape \(2,\) is not one value per sample of a batch of 3"):
        scheduler.add_noise(x0, noise, torch.tensor([7, 7]))
    for wrong in (-1, 1000):
        with pytest.raises(ValueError, match=r"timesteps=.* within 0\.\.999"):
            scheduler.add_noise(x0, noise, torch.tensor([7, wrong, 7]))


def test_tables_copied_in_inference_mode_serve_training():
    """Validation comes before training and makes the copy for the device, here one that holds no data."""
    scheduler, t = DDIMScheduler(), torch.tensor(5)
    latents = torch.ones(2, 3, requires_grad=True, device="meta")
    with torch.inference_mode():
        scheduler.add_noise(latents, latents, t)
    scheduler.add_noise(latents, latents, t).sum().backward()
    assert latents.grad is not None


def test_built_under_another_default_device_the_tables_stay_real():
    with torch.device("meta"):
        scheduler = DDIMScheduler(rescale_betas_zero_snr=True, beta_schedule="squaredcos_cap_v2")
        scheduler.set_timesteps(5)
        trained = DDPMScheduler(num_train_timesteps=2, trained_betas=[0.1, 0.2])
    for table in (scheduler.timesteps, scheduler.alphas_cumprod, trained.betas, trained.final_alpha_cumprod):
        assert table.device.type == "cpu"


# Steps


@BOTH
def test_a_step_needs_a_timestep_of_the_schedule(scheduler_class):
    scheduler, x = scheduler_class(), torch.zeros(1, 2)
    scheduler.set_timesteps(10)
    for wrong in (900.0, torch.tensor([900, 900]), "900", None):
        with pytest.raises(ValueError, match="not one whole number"):
            scheduler.step(x, wrong, x)
    scheduler.step(x, 901, x, prev_timestep=-5)
    with pytest.raises(ValueError, match=r"prev_timestep=950 .* below timestep=901"):
        scheduler.step(x, 901, x, prev_timestep=950)
    for wrong in (1000, -1):
        with pytest.raises(ValueError, match=rf"timestep={wrong} .* within 0\.\.999"):
            scheduler.step(x, wrong, x)
        with pytest.raises(ValueError, match=f"timestep={wrong}"):
            scheduler.step(x, wrong, x, prev_timestep=-2)
    with pytest.raises(ValueError, match=r"model_output has shape \(1, 4\)"):
        scheduler.step(torch.zeros(1, 4), 900, x)


@BOTH
def test_without_set_timesteps_all_of_the_schedule_are_visited(scheduler_class):
    scheduler, complete = scheduler_class(), scheduler_class()
    complete.set_timesteps(1000)
    assert torch.equal(scheduler.timesteps, complete.timesteps)
    x, noise = torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(0)).unbind()
    for t in (999, torch.tensor(500), torch.tensor([1]), 0):
        results = [each.step(0.3 * x, t, x, variance_noise=noise).prev_sample for each in (scheduler, complete)]
        assert torch.equal(*results)


@BOTH
@pytest.mark.parametrize("spacing", SPACINGS)
def test_from_a_timestep_that_is_not_listed_a_step_goes_t_over_n_back(scheduler_class, spacing):
    scheduler, x = scheduler_class(timestep_spacing=spacing), torch.randn(2, 3)
    scheduler.set_timesteps(7)  # 1000 // 7 = 142
    noise = {"variance_noise": torch.randn(2, 3)}
    for t in (990, torch.tensor(335), 141, 1):
        assert int(t) not in scheduler.timesteps.tolist()
        expected = scheduler.step(0.3 * x, t, x, **noise, prev_timestep=int(t) - 142).prev_sample
        assert torch.equal(scheduler.step(0.3 * x, t, x, **noise).prev_sample, expected)
    assert [scheduler.previous_timestep(t) for t in (335, 141)] == [193, -1]


@pytest.mark.parametrize("t", [990, 333, 141, 1, 0])
def test_from_any_timestep_ddim_goes_where_the_namesake_does(t):
    settings = {"clip_sample": False, "timestep_spacing": "leading"}
    ours, theirs = DDIMScheduler(**settings), pytest.importorskip("diffusers").DDIMScheduler(**settings)
    x, output = torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(0)).unbind()
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(7)
    assert_close_relative(ours.step(output, t, x).prev_sample, theirs.step(output, t, x).prev_sample, 1e-4)


@pytest.mark.parametrize("t", [999, 500, 1, 0])
def test_without_set_timesteps_ddpm_steps_as_the_namesake_does(t):
    ours, theirs = DDPMScheduler(), pytest.importorskip("diffusers").DDPMScheduler()
    x, output = torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(0)).unbind()
    results = [
        scheduler.step(output, torch.tensor(t), x, generator=torch.Generator().manual_seed(1)).prev_sample
        for scheduler in (ours, theirs)
    ]
    assert_close_relative(*results, 1e-4)


@BOTH
def test_the_timestep_may_be_a_number_or_a_tensor_of_one(scheduler_class):
    scheduler, x = scheduler_class(clip_sample=False), torch.randn(2, 3)
    scheduler.set_timesteps(10)
    noise = {"variance_noise": torch.randn(2, 3)}
    expected = scheduler.step(x, 900, x, **noise).prev_sample
    for timestep in (scheduler.timesteps[0], torch.tensor([900]), scheduler.timesteps.numpy()[0]):
        assert torch.equal(scheduler.step(x, timestep, x, **noise).prev_sample, expected)


@BOTH
def test_result_is_named_and_a_tuple(scheduler_class):
    scheduler, x = scheduler_class(), torch.randn(2, 3)
    scheduler.set_timesteps(10)
    noise = {"variance_noise": torch.randn(2, 3)}
    named, plain = scheduler.step(x, 900, x, **noise), scheduler.step(x, 900, x, return_dict=False, **noise)
    assert type(plain) is tuple
    assert torch.equal(named.prev_sample, plain[0])
    assert torch.equal(named.pred_original_sample, plain[1])
    assert list(named) == ["prev_sample", "pred_original_sample"]
    assert named[0] is named["prev_sample"] is named.prev_sample


@BOTH
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction_type", PARAMETERIZATIONS)
def test_constant_data_stays_constant(scheduler_class, prediction_type, spacing):
    """A network that knows the only image there is ends at that image, with any number of steps."""
    scheduler = scheduler_class(prediction_type=prediction_type, timestep_spacing=spacing, clip_sample=False)
    x0 = torch.full((2, 3), 0.7)
    for count in (1, 3, 7, 61):
        scheduler.set_timesteps(count)
        x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
        for t in scheduler.timesteps:
            alpha, sigma = scheduler.rates(t, x)
            noise = (x - alpha * x0) / sigma
            x = scheduler.step(scheduler.get_target(x0, noise, t), t, x, generator=None).prev_sample
        torch.testing.assert_close(x, x0, rtol=0, atol=1e-3)


@BOTH
def test_zero_snr_with_epsilon_prediction_is_refused_where_it_fails(scheduler_class):
    scheduler, x = scheduler_class(rescale_betas_zero_snr=True, timestep_spacing="trailing"), torch.zeros(1, 2)
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match=r"timestep 999.*alphas_cumprod is 0.*v_prediction"):
        scheduler.step(x, 999, x)
    scheduler.step(x, 749, x)
    for prediction_type in ("sample", "v_prediction"):
        scheduler = scheduler_class.from_config(scheduler.config, prediction_type=prediction_type)
        scheduler.set_timesteps(4)
        assert scheduler.step(x + 1, 999, x + 1).prev_sample.isfinite().all()


def test_dynamic_threshold_limits_each_sample_by_its_own_quantile():
    x = torch.stack([torch.linspace(-4, 4, 101), torch.linspace(-0.5, 0.5, 101)])
    limited = dynamic_threshold(x, 1.0, 2.0)
    assert limited[0].abs().max() == 1
    assert limited[0, 75] == x[0, 75] / 2  # divided by the limit, 4 cut down to 2
    assert torch.equal(limited[1], x[1])
    assert torch.equal(dynamic_threshold(x, 0.995, 1.0), x.clamp(-1, 1))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@BOTH
def test_on_a_gpu_nothing_waits_for_the_device(scheduler_class):
    scheduler = scheduler_class(clip_sample=False)
    scheduler.set_timesteps(5)
    x = torch.randn(2, 3, device="cuda")
    t = torch.tensor([3, 900], device="cuda")
    own = torch.Generator("cuda").manual_seed(0)
    scheduler.add_noise(x, x, t)  # copies the tables, once
    torch.cuda.set_sync_debug_mode("error")
    try:
        noisy = scheduler.add_noise(x, x, t)
        stepped = scheduler.step(x, scheduler.timesteps[0], x, generator=own).prev_sample
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(noisy.cpu(), scheduler.add_noise(x.cpu(), x.cpu(), t.cpu()))
    assert stepped.is_cuda

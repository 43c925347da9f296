import pytest
import torch

from ldm_lab.diffusion.ddim import DDIMScheduler
from ldm_lab.diffusion.objective import DenoisingObjective, L1Loss, L2Loss, MinSNRWeighting, PlainWeighting
from ldm_lab.diffusion.parameterization import PARAMETERIZATIONS
from ldm_lab.diffusion.timesteps import LowDiscrepancyTimesteps, UniformTimesteps, stratified


def objective(loss=None, weighting=None, timesteps=None, **scheduler):
    parts = loss or L2Loss(), weighting or PlainWeighting(), timesteps or UniformTimesteps()
    return DenoisingObjective(DDIMScheduler(**scheduler), *parts)


@pytest.fixture
def batch():
    x0, noise = torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0)).unbind()
    return x0, noise, torch.tensor([0, 100, 600, 999])


@pytest.mark.parametrize("prediction_type", PARAMETERIZATIONS)
def test_the_network_sees_noisy_samples_and_a_perfect_one_has_no_loss(prediction_type, batch):
    x0, noise, t = batch
    denoising = objective(prediction_type=prediction_type)

    def perfect(x_t, timesteps):
        assert torch.equal(x_t, denoising.scheduler.add_noise(x0, noise, t))
        assert torch.equal(timesteps, t)
        return denoising.target(x0, noise, t)

    assert torch.equal(denoising(perfect, *batch), torch.zeros(4))


def test_targets(batch):
    x0, noise, t = batch
    assert torch.equal(objective(prediction_type="epsilon").target(*batch), noise)
    assert torch.equal(objective(prediction_type="sample").target(*batch), x0)
    velocity = objective(prediction_type="v_prediction")
    assert torch.equal(velocity.target(*batch), velocity.scheduler.get_velocity(x0, noise, t))


@pytest.mark.parametrize("prediction_type", PARAMETERIZATIONS)
def test_min_snr_counts_the_error_in_x0_by_the_capped_snr(prediction_type, batch):
    """Whatever the network predicts, the loss is min(SNR, 5) times the squared error of the x0 it stands for."""
    x0, noise, t = batch
    denoising = objective(weighting=MinSNRWeighting(5.0), prediction_type=prediction_type)
    scheduler = denoising.scheduler
    wrong = denoising.target(*batch).double() + 0.1 * torch.randn(4, 3, 8, 8).double()
    noisy = scheduler.add_noise(x0.double(), noise.double(), t)
    error = (scheduler.predict_x0(wrong, t, noisy) - x0).square().mean((1, 2, 3))
    alpha_bar = scheduler.alphas_cumprod[t].double()
    expected = (alpha_bar / (1 - alpha_bar)).clamp(max=5.0) * error
    ours = denoising(lambda *_: wrong, *batch)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-3, atol=1e-7)


def test_min_snr_weights_of_the_paper():
    snr = torch.tensor([0.01, 1.0, 5.0, 100.0])
    weigh = MinSNRWeighting(gamma=5.0)
    capped = torch.tensor([0.01, 1.0, 5.0, 5.0])
    for name, expected in (("epsilon", capped / snr), ("sample", capped), ("v_prediction", capped / (snr + 1))):
        torch.testing.assert_close(weigh(snr, PARAMETERIZATIONS[name]), expected)
    for gamma in (0.0, -1.0, "5", None):
        with pytest.raises(ValueError, match="gamma="):
            MinSNRWeighting(gamma)


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
def test_min_snr_trains_the_first_step_of_sampling_too(prediction_type):
    """With zero terminal SNR the last timestep counts as in the plain objective, all others as in the paper."""
    settings = {"rescale_betas_zero_snr": True, "prediction_type": prediction_type}
    weighted, plain = objective(weighting=MinSNRWeighting(), **settings), objective(**settings)
    snr, parameterization = weighted.scheduler.snr(torch.arange(1000)), weighted.scheduler.parameterization
    weights = weighted.weighting(snr, parameterization)
    assert snr[-1] == 0
    assert weights[-1] == 1
    torch.testing.assert_close(weights[:-1], (snr.clamp(max=5) / parameterization.error_scale(snr))[:-1])

    x0, noise = torch.randn(2, 1, 3, 8, 8, generator=torch.Generator().manual_seed(0)).unbind()
    scale = torch.tensor(0.5, requires_grad=True)
    losses = [each(lambda x_t, _: scale * x_t, x0, noise, torch.tensor([999])).sum() for each in (weighted, plain)]
    gradients = [torch.autograd.grad(loss, scale)[0] for loss in losses]
    assert gradients[0] == gradients[1] != 0


@pytest.mark.parametrize("prediction_type", PARAMETERIZATIONS)
def test_min_snr_has_no_weight_that_is_no_number(prediction_type):
    weights = MinSNRWeighting()(torch.tensor([0.0, 1e-30]), PARAMETERIZATIONS[prediction_type])
    assert weights.isfinite().all()


def test_losses_are_means_over_each_sample():
    prediction, target = torch.zeros(2, 3, 2, 2), torch.stack([torch.full((3, 2, 2), 2.0), torch.full((3, 2, 2), -3.0)])
    assert L2Loss()(prediction, target).tolist() == [4.0, 9.0]
    assert L1Loss()(prediction, target).tolist() == [2.0, 3.0]


def test_half_precision_loss_is_computed_in_single(batch):
    x0, noise, t = batch[0].bfloat16(), batch[1].bfloat16(), batch[2]
    loss = objective()(lambda x_t, _: torch.zeros_like(x_t), x0, noise, t)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, noise.float().square().mean((1, 2, 3)))


def test_gradient_reaches_the_network(batch):
    scale = torch.tensor(0.5, requires_grad=True)
    for weighting in (PlainWeighting(), MinSNRWeighting()):
        scale.grad = None
        objective(weighting=weighting)(lambda x_t, _: scale * x_t, *batch).mean().backward()
        assert scale.grad.isfinite()
        assert scale.grad != 0


def test_draws_go_through_the_injected_part():
    denoising = objective(timesteps=LowDiscrepancyTimesteps(), num_train_timesteps=100)
    drawn = denoising.draw_timesteps(seed=1, positions=[3, 2], batch_size=4)
    assert torch.equal(drawn, LowDiscrepancyTimesteps()(1, [3, 2], 4, 100))


def test_validation_timesteps_are_fixed_and_even():
    denoising = objective()
    timesteps = denoising.validation_timesteps(512)
    assert torch.equal(timesteps, denoising.validation_timesteps(512))
    assert timesteps.dtype == torch.int64
    assert timesteps.double().mean() == pytest.approx(499.5, abs=1)
    assert (timesteps * 8 // 1000).bincount().tolist() == [64] * 8
    assert denoising.at(torch.tensor([0.0, 0.5, 0.9999])).tolist() == [0, 500, 999]


@pytest.mark.parametrize("count", [100, 512, 10_000])
def test_validation_timesteps_have_nothing_to_do_with_the_order_of_the_images(count):
    """Which is that of their names, and so often of their classes."""
    denoising = objective()
    timesteps = denoising.validation_timesteps(count)
    assert torch.equal(timesteps.sort().values, denoising.at(stratified(count)))
    ranks = timesteps.argsort(stable=True).argsort().double()
    correlation = torch.corrcoef(torch.stack([torch.arange(count).double(), ranks]))[0, 1]
    assert abs(correlation) < 3 / count**0.5
    torch.manual_seed(1)
    assert torch.equal(objective().validation_timesteps(count), timesteps)


def test_epsilon_with_zero_terminal_snr_is_refused():
    with pytest.raises(ValueError, match="prediction_type='epsilon' cannot be trained with zero terminal SNR"):
        objective(rescale_betas_zero_snr=True)
    denoising = objective(weighting=MinSNRWeighting(), rescale_betas_zero_snr=True, prediction_type="v_prediction")
    x0, noise = torch.randn(2, 1, 2, 4, 4).unbind()
    assert denoising(lambda x_t, _: x_t, x0, noise, torch.tensor([999])).isfinite().all()


def test_shapes_that_do_not_fit_are_named(batch):
    x0, noise, t = batch
    with pytest.raises(ValueError, match=r"noise has shape \(1, 3, 8, 8\)"):
        objective()(lambda x_t, _: x_t, x0, noise[:1], t)
    with pytest.raises(ValueError, match=r"the network predicts shape \(4, 1, 8, 8\)"):
        objective()(lambda x_t, _: x_t[:, :1], *batch)

"""Schedulers and objective around the small network whose outputs in CompVis's code were recorded."""

import pytest
import torch

from ldm_lab.checkpoints.compvis import unet_config, unet_state
from ldm_lab.diffusion.ddim import DDIMScheduler
from ldm_lab.diffusion.ddpm import DDPMScheduler
from ldm_lab.diffusion.objective import DenoisingObjective, L1Loss, L2Loss, PlainWeighting
from ldm_lab.diffusion.timesteps import UniformTimesteps
from ldm_lab.models.unet import UNet2DModel
from tests.diffusion.golden import compvis, compvis_meta, recorded_schedule
from tests.helpers import assert_close_relative


@pytest.fixture(scope="module")
def predict():
    config = unet_config(compvis_meta()["arch"]["unet"])
    unet = UNet2DModel(**config).eval()
    state = {key: value.float() for key, value in compvis("unet_state").items()}
    unet.load_weights(unet_state(state, config), origin="unet_state.safetensors")

    @torch.no_grad()
    def predict(x_t, t):
        return unet(x_t, t).sample

    return predict


@pytest.mark.parametrize(("name", "loss"), [("l2", L2Loss()), ("l1", L1Loss())])
def test_training_loss(predict, name, loss):
    io = compvis("io")
    denoising = DenoisingObjective(DDIMScheduler(**recorded_schedule()), loss, PlainWeighting(), UniformTimesteps())
    per_sample = denoising(predict, io["in.q_x0"], io["in.q_noise"], io["in.q_t"])
    assert per_sample.shape == io["in.q_t"].shape
    assert_close_relative(per_sample.mean(), io[f"p_losses.{name}.loss"], 1e-5)
    weights = compvis("schedule")["celebahq.lvlb_weights"][io["in.q_t"]]  # tells the samples apart
    assert_close_relative((weights * per_sample).mean(), io[f"p_losses.{name}.vlb"], 1e-5)


def test_one_ancestral_step_from_each_of_several_timesteps(predict):
    io = compvis("io")
    scheduler = DDPMScheduler.from_config(recorded_schedule())
    x, noise, timesteps = io["in.q_x0"], io["in.q_noise"], io["in.q_t"]
    epsilon = predict(x, timesteps)
    steps = [
        scheduler.step(epsilon[[i]], t, x[[i]], variance_noise=noise[[i]], prev_timestep=t - 1).prev_sample
        for i, t in enumerate(timesteps.tolist())
    ]
    assert_close_relative(torch.cat(steps), io["p_sample.ddpm_one_step"], 1e-5)


@pytest.mark.parametrize("eta", [0, 1])
def test_ten_ddim_steps(predict, eta):
    io = compvis("io")
    scheduler = DDIMScheduler(**recorded_schedule())
    scheduler.set_timesteps(10)
    x = io["in.ddim_xT"]
    for step, t in enumerate(scheduler.timesteps):
        noise = io["in.ddim_eta1_noise"][step] if eta else None
        x, x0 = scheduler.step(predict(x, t), t, x, eta=eta, variance_noise=noise).to_tuple()
        assert_close_relative(x, io[f"ddim10.eta{eta}.x"][step + 1])
        assert_close_relative(x0, io[f"ddim10.eta{eta}.pred_x0"][step + 1])

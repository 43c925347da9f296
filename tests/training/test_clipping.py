"""Gradients are clipped network by network."""

import pytest
import torch
from torch.nn.utils import clip_grad_norm_, get_total_norm

from tests.trained import assert_equal, final_weights, metrics, train
from tests.training.stages import tiny
from tests.training.test_numbers import with_callbacks


def with_gradients(stage, scale=1.0):
    """A stage, its optimizer, and the parameters of each of its networks, whose gradients have norms 1, `scale`, ..."""
    module = tiny(stage)[0]
    generator = torch.Generator().manual_seed(0)
    groups = [group["params"] for group in module.parameter_groups()]
    for number, parameters in enumerate(groups):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        norm = get_total_norm([parameter.grad for parameter in parameters])
        for parameter in parameters:
            parameter.grad *= scale**number / norm
    return module, module.make_optimizer(module.parameter_groups()), groups


def gradients(parameters):
    return [parameter.grad.clone() for parameter in parameters]


def test_a_player_is_not_clipped_by_the_norm_of_the_other():
    module, optimizer, (autoencoder, discriminator) = with_gradients("celebahq/autoencoder", scale=1e4)
    before = gradients(autoencoder)
    module.configure_gradient_clipping(optimizer, 2.0)
    assert_equal(gradients(autoencoder), before)
    assert get_total_norm(gradients(discriminator)) == pytest.approx(2.0, rel=1e-4)
    module.configure_gradient_clipping(optimizer, 0.5, "norm")
    assert get_total_norm(gradients(autoencoder)) == pytest.approx(0.5, rel=1e-4)
    module.configure_gradient_clipping(optimizer, 0.0)
    module.configure_gradient_clipping(optimizer, None)
    assert get_total_norm(gradients(autoencoder)) == pytest.approx(0.5, rel=1e-4)


def test_one_network_is_clipped_as_before():
    module, optimizer, (unet,) = with_gradients("celebahq/diffusion")
    same = [torch.nn.Parameter(parameter.detach()) for parameter in unet]
    for parameter, gradient in zip(same, gradients(unet), strict=True):
        parameter.grad = gradient
    module.configure_gradient_clipping(optimizer, 0.1)
    clip_grad_norm_(same, 0.1)
    assert_equal(gradients(unet), gradients(same))


def test_the_step_of_the_autoencoder_is_that_without_clipping_where_the_discriminator_is_wild(tmp_path):
    command = ["experiment=celebahq/autoencoder", "callbacks=none", "max_images=8"]
    poison = {"positions": [0], "parameter": "loss.discriminator.main.0.weight", "value": 1e6}
    for clip in ("null", "1000"):
        settings = [f"name=clip_{clip}", f"trainer.gradient_clip_val={clip}"]
        train(tmp_path, *command, *settings, *with_callbacks(Poison=poison))
    free, clipped = (tmp_path / f"clip_{clip}/autoencoder" for clip in ("null", "1000"))
    assert_equal(final_weights(clipped), final_weights(free))
    row = metrics(clipped)[8]  # what is reported is not clipped
    assert row["train/grad_norm"] < 1000 < 1e6 < row["disc/grad_norm"]


def test_values_are_clipped_where_it_is_asked_for(tmp_path):
    command = ["experiment=celebahq/autoencoder", "callbacks=none", "max_images=8"]
    for name, value in (("tiny", "1e-30"), ("huge", "1e30")):
        settings = [f"trainer.gradient_clip_val={value}", "+trainer.gradient_clip_algorithm=value"]
        train(tmp_path, *command, *settings, f"name={name}")
    tiny_steps, huge = (final_weights(tmp_path / f"{name}/autoencoder") for name in ("tiny", "huge"))
    (one,), (two,) = tiny_steps.values(), huge.values()
    assert any(not torch.equal(one[key], two[key]) for key in one)

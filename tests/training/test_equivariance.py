"""`model.equivariance`: latents and images are transformed alike, by draws that follow from seed and step."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from ldm_lab.config.compose import Recipe, build
from ldm_lab.data.drawn import DrawnImages
from ldm_lab.training.equivariance import UNCHANGED, Equivariance, Transform
from tests.helpers import assert_close_relative
from tests.trained import metrics, train
from tests.training.test_resume import assert_same_training, interrupt

ALWAYS = "model.equivariance.probability=1"
KL = "experiment=lsun_churches/autoencoder"


def encode(images, factor=4):
    """An encoder that is equivariant: averages of patches."""
    return F.avg_pool2d(images, factor)


def smooth(height=64, width=64):
    noise = torch.randn(2, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    return F.interpolate(noise, (height, width), mode="bicubic", align_corners=True)


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_turned_latents_are_those_of_the_turned_image(turns):
    transform, images = Transform(None, turns), torch.randn(2, 3, 32, 48)
    found, expected = transform.latents(encode(images)), encode(transform.images(images, 4))
    assert found.shape[-2:] == ((12, 8) if turns % 2 else (8, 12))
    assert_close_relative(found, expected, 1e-6)


@pytest.mark.parametrize("size", [(4, 4), (8, 6), (11, 11), (15, 15)])
def test_resampled_latents_are_those_of_the_resampled_image(size):
    transform, images = Transform(size, 1), smooth()
    target = transform.images(images, 4)
    assert target.shape[-2:] == (4 * size[1], 4 * size[0])
    found, expected = transform.latents(encode(images)), encode(target)
    assert found.shape == expected.shape
    assert (found - expected).std() < 0.5 / min(size) * expected.std()  # the filters differ at the scale of a position
    assert (Transform(size, 3).latents(encode(images)) - expected).std() > expected.std()  # turned the other way


def test_without_a_transform_tensors_are_the_same_objects():
    images = torch.randn(1, 3, 8, 8)
    assert UNCHANGED.images(images, 4) is UNCHANGED.latents(images) is images
    assert all(Equivariance().draw(0, step, (8, 8)) is UNCHANGED for step in range(50))


def test_draws_follow_from_seed_and_step_and_have_their_probability():
    half, size = Equivariance(0.5), (16, 24)
    draws = [half.draw(3, step, size) for step in range(1000)]
    assert draws == [Equivariance(0.5).draw(3, step, size) for step in range(1000)]
    assert draws[:20] != [half.draw(4, step, size) for step in range(20)]
    changed = [draw for draw in draws if draw != UNCHANGED]
    assert 0.45 < len(changed) / 1000 < 0.55
    assert {draw.turns for draw in changed} == {1, 2, 3}
    assert {draw.size[0] for draw in changed} == set(range(4, 17))  # 16 {8, ..., 31} / 32, rounded
    always = Equivariance(1.0)
    assert UNCHANGED not in [always.draw(0, step, size) for step in range(200)]


def test_scales_that_give_too_small_images_are_not_drawn():
    always = Equivariance(1.0)
    assert {always.draw(0, step, (16, 32), smallest=12).size[0] for step in range(200)} == set(range(12, 17))
    assert {always.draw(0, step, (8, 8), smallest=9).size for step in range(20)} == {None}  # only turns


@pytest.mark.parametrize("probability", [-0.1, 1.5])
def test_probabilities_end_in_one_line(probability, tmp_path):
    key = "model.equivariance.probability"
    with pytest.raises(ValueError, match=rf"^{key}={probability}: must be a number from 0 to 1$"):
        train(tmp_path, KL, f"{key}={probability}")
    with pytest.raises(ValueError, match=r"equivariance.probability=.* it must be from 0 to 1"):
        Equivariance(probability)


def module_with(experiment, *overrides):
    (config,) = Recipe.parse([f"experiment={experiment}/autoencoder", "debug=tiny", *overrides]).compose()
    module = build(config.model, "model")
    module._trainer = SimpleNamespace(training=True, datamodule=SimpleNamespace(global_batch_size=8))
    return module


def test_latents_that_are_kept_are_not_transformed():
    with pytest.raises(ValueError, match=r"probability=1: changes the latents, which model.train=decoder leaves"):
        module_with("avatars", ALWAYS, "model.train=decoder")


@pytest.mark.parametrize("experiment", ["celebahq", "lsun_churches"])
def test_every_step_compares_transformed_images(experiment):
    """With the discriminator, whose least size the scales respect; micro-batches of a step agree."""
    module = module_with(experiment, ALWAYS, "model.loss.discriminator.channels=8")
    images = torch.stack([DrawnImages("train", 32)[place]["image"] for place in range(2)])
    batch = module.on_before_batch_transfer({"image": images, "position": torch.arange(2)}, 0)
    last_layer, sides = module.autoencoder.decoder.conv_out.weight, set()
    for step in range(40):
        module.images_seen = 8 * step
        transform = module._transform(images)
        module.images_seen += 4
        assert module._transform(images) == transform != UNCHANGED
        if (side := transform.size[0]) in sides:
            continue
        sides.add(side)
        reconstruction, penalty = module.reconstruct(batch, transform)
        target = transform.images(images, 4)
        assert reconstruction.shape == target.shape == (2, 3, 4 * side, 4 * side)
        output = module.loss(target, reconstruction, penalty, last_layer, 10**6)
        output.total.backward()
        assert output.total.isfinite()
    smallest = module.loss.discriminator.smallest_side // 4
    assert sides == set(range(smallest, 9))
    assert all(p.grad.isfinite().all() for p in module.autoencoder.parameters())


def test_an_interrupted_training_of_a_kl_autoencoder_ends_as_an_undisturbed_one(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    train(one, KL, ALWAYS)
    with pytest.raises(SystemExit):
        train(two, KL, ALWAYS, *interrupt("autoencoder", 24))
    train(two, KL, ALWAYS)
    assert_same_training(two / "lsun_churches/autoencoder", one / "lsun_churches/autoencoder")
    assert 0 < metrics(one / "lsun_churches/autoencoder")[64]["val/latent_high_frequency"] < 1

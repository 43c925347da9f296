import pytest
import torch

from ldm_lab.models.kl_model import AutoencoderKL
from ldm_lab.models.outputs import DiagonalGaussian
from tests.helpers import assert_close_relative
from tests.models.weights import assert_equal_weights

TINY = {
    "down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
    "up_block_types": ["AttnUpDecoderBlock2D", "UpDecoderBlock2D"],
    "block_out_channels": [8, 16],
    "norm_num_groups": 4,
}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return AutoencoderKL(**TINY).eval()


def gaussian(mean, logvar):
    return DiagonalGaussian(torch.cat([torch.full((2, 3, 4, 5), float(value)) for value in (mean, logvar)], dim=1))


# The distribution.


def test_the_divergence_is_that_of_the_formula():
    assert gaussian(0, 0).kl().tolist() == [0, 0]
    own = torch.distributions.Normal(0.5, torch.tensor(-1.0).exp())
    expected = torch.distributions.kl_divergence(own, torch.distributions.Normal(0.0, 1.0))
    assert_close_relative(gaussian(0.5, -2).kl(), 60 * expected.expand(2), 1e-6)


def test_the_variance_stays_in_bounds():
    assert gaussian(0, 1000).logvar.unique() == 20
    assert gaussian(0, -1000).logvar.unique() == -30
    assert gaussian(0, -1000).std.min() > 0


def test_draws_have_mean_and_deviation():
    posterior = DiagonalGaussian(torch.tensor([3.0, 2 * torch.tensor(0.5).log()]).view(1, 2, 1, 1).expand(1, 2, 99, 99))
    draw = posterior.sample(torch.Generator().manual_seed(0))
    assert draw.mean().item() == pytest.approx(3, abs=0.02)
    assert draw.std().item() == pytest.approx(0.5, abs=0.02)


def test_a_draw_follows_from_its_generator():
    posterior = gaussian(1, 0)
    draws = [posterior.sample(torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[1], draws[2])
    noise = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(1))
    assert torch.equal(draws[0], posterior.from_noise(noise))


# The network.


def test_shapes(model):
    images = torch.randn(2, 3, 16, 24)
    posterior = model.encode(images).latent_dist
    assert posterior.mean.shape == posterior.std.shape == (2, 4, 8, 12)
    assert model.decode(posterior.mean).sample.shape == images.shape
    assert (model.embed_dim, model.downsample_factor, model.draws_latents) == (4, 2, True)


@torch.no_grad()
def test_latents_are_the_mean_or_drawn_with_noise(model):
    images, noise = torch.randn(2, 3, 16, 16), torch.randn(2, 4, 8, 8)
    posterior = model.encode(images).latent_dist
    assert torch.equal(model.latents(images), posterior.mean)
    assert torch.equal(model.latents(images, noise), posterior.mean + posterior.std * noise)


def test_nothing_is_scaled():
    models = [AutoencoderKL(**TINY, scaling_factor=factor).eval() for factor in (1.0, 0.1)]
    models[1].load_state_dict(models[0].state_dict())
    images = torch.randn(1, 3, 16, 16)
    assert torch.equal(*(model.latents(images) for model in models))
    assert torch.equal(*(model(images).sample for model in models))


def test_forward_decodes_the_mean_or_a_draw(model):
    images = torch.randn(1, 3, 16, 16)
    assert torch.equal(model(images).sample, model.decode(model.latents(images)).sample)
    seeds = [torch.Generator().manual_seed(3) for _ in range(2)]
    draw = model.encode(images).latent_dist.sample(seeds[0])
    assert torch.equal(model(images, sample_posterior=True, generator=seeds[1]).sample, model.decode(draw).sample)


def test_tuples(model):
    images = torch.randn(1, 3, 16, 16)
    (posterior,) = model.encode(images, return_dict=False)
    assert torch.equal(posterior.mean, model.latents(images))
    (sample,) = model.decode(posterior.mean, return_dict=False)
    assert torch.equal(sample, model(images).sample)
    assert torch.equal(model(images, return_dict=False)[0], sample)


def test_gradients_reach_every_parameter(model):
    posterior = model.encode(torch.randn(1, 3, 16, 16)).latent_dist
    output = model.decode(posterior.sample()).sample
    (output.square().mean() + posterior.kl().sum()).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_the_convolutions_beside_the_latents_can_be_left_out(model):
    without = AutoencoderKL(**TINY, use_quant_conv=False, use_post_quant_conv=False)
    removed = set(model.state_dict()) - set(without.state_dict())
    assert removed == {f"{name}quant_conv.{kind}" for name in ("", "post_") for kind in ("weight", "bias")}
    assert without(torch.randn(1, 3, 16, 16)).sample.shape == (1, 3, 16, 16)


def test_a_network_in_bfloat16_gives_bfloat16(model):
    images, noise = torch.randn(1, 3, 16, 16).bfloat16(), torch.randn(1, 4, 8, 8)
    latents = model.to(torch.bfloat16).latents(images, noise)
    assert latents.dtype == model.decode(latents).sample.dtype == torch.bfloat16


def test_folders_round_trip(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = AutoencoderKL.from_pretrained(tmp_path)
    assert loaded.config == model.config
    assert_equal_weights(loaded, model)
    assert not loaded.training


def test_the_scale_of_stable_diffusion_is_the_default():
    """Its folders leave the key out."""
    assert AutoencoderKL(**TINY).config.scaling_factor == 0.18215


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"act_fn": "gelu"}, "act_fn='gelu' is not supported: use 'silu'"),
        ({"shift_factor": 0.1}, "shift_factor=0.1 is not supported: use None"),
        ({"latents_mean": (0.0, 1.0)}, "latents_mean=[0.0, 1.0] is not supported: use None"),
        ({"latents_std": [1.0]}, "latents_std=[1.0] is not supported: use None"),
        ({"latent_channels": 0}, "latent_channels=0 is not a positive integer"),
        ({"block_out_channels": [8, 18]}, "norm_num_groups=4 does not divide 18, a width of block_out_channels"),
    ],
)
def test_impossible_arguments_get_one_clear_line(change, message):
    with pytest.raises(ValueError) as error:
        AutoencoderKL(**{**TINY, **change})
    assert str(error.value) == message


def test_images_that_do_not_fit_get_one_clear_line(model):
    with pytest.raises(ValueError, match=r"AutoencoderKL\.encode takes .* multiples of 2, got 16x17$"):
        model.latents(torch.randn(1, 3, 16, 17))
    with pytest.raises(ValueError, match=r"AutoencoderKL\.decode takes \(B, 4, H, W\), got .* \(1, 3, 8, 8\)$"):
        model.decode(torch.randn(1, 3, 8, 8))

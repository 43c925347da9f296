import pytest
import torch

from ldm_lab.models.vq_model import VQModel
from ldm_lab.utils.reading import LoadError
from tests.models.weights import assert_equal_weights

TINY = {
    "down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
    "up_block_types": ["AttnUpDecoderBlock2D", "UpDecoderBlock2D"],
    "block_out_channels": [8, 16],
    "norm_num_groups": 4,
    "num_vq_embeddings": 16,
}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return VQModel(**TINY).eval()


def test_shapes(model):
    images = torch.randn(2, 3, 16, 24)
    latents = model.encode(images).latents
    assert latents.shape == (2, 3, 8, 12)
    assert model.decode(latents).sample.shape == images.shape
    assert model.downsample_factor == 2


def test_encode_neither_scales_nor_quantizes():
    torch.manual_seed(0)
    model = VQModel(**TINY, scaling_factor=0.1)
    images = torch.randn(1, 3, 16, 16)
    latents = model.encode(images).latents
    assert torch.equal(latents, model.quant_conv(model.encoder(images)))
    codes = model.quantize.embedding.weight
    assert (latents[0, :, 0, 0] - codes).abs().sum(1).min() > 1e-3


def test_decode_quantizes_unless_told_not_to(model):
    torch.nn.init.normal_(model.quantize.embedding.weight)
    latents = torch.randn(1, 3, 8, 8)
    quantized, loss, _ = model.quantize(latents)
    assert torch.equal(model.decode(latents).sample, model.decode(quantized, force_not_quantize=True).sample)
    assert torch.equal(model.decode(latents).commit_loss, loss)
    assert model.decode(latents, force_not_quantize=True).commit_loss == 0
    assert not torch.allclose(model.decode(latents, force_not_quantize=True).sample, model.decode(latents).sample)


def test_forward_is_encode_then_decode(model):
    images = torch.randn(1, 3, 16, 16)
    output = model(images)
    assert torch.equal(output.sample, model.decode(model.encode(images).latents).sample)
    assert output.commit_loss > 0


def test_tuples(model):
    images = torch.randn(1, 3, 16, 16)
    (latents,) = model.encode(images, return_dict=False)
    assert torch.equal(latents, model.encode(images).latents)
    for values, output in (
        (model.decode(latents, return_dict=False), model.decode(latents)),
        (model(images, return_dict=False), model(images)),
    ):
        assert torch.equal(values[0], output.sample)
        assert torch.equal(values[1], output.commit_loss)


def test_codes_can_be_decoded_by_number():
    model = VQModel(**TINY, lookup_from_codebook=True).eval()
    torch.nn.init.normal_(model.quantize.embedding.weight)
    latents = torch.randn(2, 3, 8, 8)
    indices = model.quantize(latents).info.indices
    decoded = model.decode(indices, force_not_quantize=True, shape=(2, 8, 8, 3)).sample
    assert torch.allclose(decoded, model.decode(latents).sample, atol=1e-5)


def test_gradients_reach_every_parameter(model):
    output = model(torch.randn(1, 3, 16, 16))
    (output.sample.square().mean() + output.commit_loss).backward()
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert missing == []


def test_attention_of_the_middle_has_one_head(model):
    assert model.encoder.mid_block.attentions[0].dim_head == 16
    without = VQModel(**TINY, mid_block_add_attention=False)
    removed = set(model.state_dict()) - set(without.state_dict())
    assert all(".mid_block.attentions.0." in key for key in removed)
    assert len(removed) == 20


def test_folders_round_trip(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = VQModel.from_pretrained(tmp_path)
    assert loaded.config == model.config
    assert_equal_weights(loaded, model)
    assert not loaded.training


def test_a_tensor_missing_or_of_another_shape_is_an_error(model):
    state = model.state_dict()
    smaller = VQModel(**{**TINY, "num_vq_embeddings": 8})
    with pytest.raises(LoadError, match=r"here: quantize\.embedding\.weight has shape \(16, 3\).*needs \(8, 3\)"):
        smaller.load_weights(state, origin="here")
    del state["encoder.conv_out.bias"]
    with pytest.raises(LoadError, match=r"here: no tensor 'encoder\.conv_out\.bias'"):
        model.load_weights(state, origin="here")


def test_missing_scaling_factor_means_one():
    assert VQModel(**TINY).config.scaling_factor == 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"act_fn": "gelu"}, "act_fn='gelu' is not supported: use 'silu'"),
        ({"norm_type": "spatial"}, "norm_type='spatial' is not supported: use 'group'"),
        (
            {"down_block_types": ["DownEncoderBlock2D", "DownBlock2D"]},
            "down_block_types='DownBlock2D' is not supported: use 'DownEncoderBlock2D' or 'AttnDownEncoderBlock2D'",
        ),
        ({"up_block_types": ["UpDecoderBlock2D"]}, "up_block_types has 1 entries, block_out_channels=[8, 16] has 2"),
        ({"block_out_channels": [8, 18]}, "norm_num_groups=4 does not divide 18, a width of block_out_channels"),
        ({"num_vq_embeddings": 0}, "num_vq_embeddings=0 is not a positive integer"),
        ({"vq_embed_dim": -1}, "vq_embed_dim=-1 is not a positive integer"),
        ({"layers_per_block": "2"}, "layers_per_block='2' is not a positive integer"),
    ],
)
def test_impossible_arguments_get_one_clear_line(change, message):
    with pytest.raises(ValueError) as error:
        VQModel(**{**TINY, **change})
    assert str(error.value) == message


def test_images_that_do_not_fit_get_one_clear_line(model):
    with pytest.raises(ValueError, match=r"multiples of 2, got 16x17$"):
        model.encode(torch.randn(1, 3, 16, 17))
    with pytest.raises(ValueError, match=r"VQModel\.encode takes \(B, 3, H, W\), got .* \(1, 4, 16, 16\)$"):
        model.encode(torch.randn(1, 4, 16, 16))
    with pytest.raises(ValueError, match=r"VQModel\.decode takes \(B, 3, H, W\), got .* \(1, 4, 8, 8\)$"):
        model.decode(torch.randn(1, 4, 8, 8))


def test_the_prefix_of_2022_says_nothing():
    types = {"down_block_types": ["UNetResDownEncoderBlock2D"], "up_block_types": ["UNetResUpDecoderBlock2D"]}
    model = VQModel(**types, block_out_channels=[8], norm_num_groups=4)
    assert model.config.down_block_types == ["UNetResDownEncoderBlock2D"]


def test_as_a_first_stage(model):
    images = torch.randn(1, 3, 16, 16)
    assert torch.equal(model.latents(images), model.encode(images).latents)
    assert (model.embed_dim, model.draws_latents) == (3, False)
    assert VQModel(**TINY, vq_embed_dim=5).embed_dim == 5
    with pytest.raises(ValueError, match="noise was given, but the latents of a VQModel are not drawn"):
        model.latents(images, torch.randn(1, 3, 8, 8))

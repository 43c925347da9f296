import json

import pytest
import torch
import torch.nn.functional as F

from ldm_lab.models.layers.attention import AttentionBlock
from ldm_lab.models.layers.resnet import ResnetBlock
from ldm_lab.models.unet import UNet2DModel
from tests.models.weights import assert_equal_weights

TINY = {
    "sample_size": 8,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
}

HEADS = {"num_attention_heads": 2, "attention_head_dim": None}
RESAMPLED = {
    "down_block_types": ["AttnDownBlock2D", "ResnetDownsampleBlock2D"],
    "up_block_types": ["ResnetUpsampleBlock2D", "AttnUpBlock2D"],
    "downsample_type": "resnet",
    "upsample_type": "resnet",
}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return UNet2DModel(**TINY).eval()


def test_the_prediction_has_the_shape_of_the_input(model):
    assert model(torch.randn(2, 3, 8, 12), 5).sample.shape == (2, 3, 8, 12)
    assert UNet2DModel(**TINY, in_channels=4, out_channels=8)(torch.randn(1, 4, 8, 8), 5).sample.shape[1] == 8


@torch.no_grad()
def test_a_timestep_may_be_one_number_or_one_for_each_sample(model):
    x = torch.randn(2, 3, 8, 8)
    expected = model(x, 7).sample
    for timestep in (7.0, torch.tensor(7), torch.tensor([7]), torch.tensor([7, 7]), torch.tensor([7.0, 7.0])):
        assert torch.equal(model(x, timestep).sample, expected)
    mixed = model(x, torch.tensor([7, 500])).sample
    assert torch.allclose(mixed[0], expected[0], atol=1e-6)
    assert torch.allclose(mixed[1], model(x[1:], 500).sample[0], atol=1e-6)
    assert not torch.allclose(mixed[1], expected[1], atol=1e-3)


def test_tuples(model):
    x = torch.randn(1, 3, 8, 8)
    (sample,) = model(x, 3, return_dict=False)
    assert torch.equal(sample, model(x, 3).sample)


def test_dropout_is_in_every_residual_block():
    model = UNet2DModel(**TINY, dropout=0.3)
    rates = [module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    assert rates == [0.3] * (2 + 2 + 4)


def test_gradients_reach_every_parameter(model):
    model(torch.randn(1, 3, 8, 8), 5).sample.square().mean().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_a_network_in_bfloat16_gives_bfloat16(model):
    output = model.to(torch.bfloat16)(torch.randn(1, 3, 8, 8, dtype=torch.bfloat16), 5).sample
    assert output.dtype == torch.bfloat16
    assert output.isfinite().all()


def test_heads_are_the_same_at_every_width():
    model = UNet2DModel(**{**TINY, **RESAMPLED, **HEADS})
    attentions = [module for module in model.modules() if isinstance(module, AttentionBlock)]
    widths = [module.to_q.in_features for module in attentions]
    assert set(widths) == {8, 16}
    assert [width / module.dim_head for width, module in zip(widths, attentions, strict=True)] == [2] * len(widths)


def test_heads_and_their_size_express_the_same_at_one_width():
    arguments = {**TINY, "block_out_channels": [8, 8]}
    by_size = UNet2DModel(**{**arguments, "attention_head_dim": 4}).eval()
    by_number = UNet2DModel(**{**arguments, **HEADS}).eval()
    by_number.load_state_dict(by_size.state_dict())
    x = torch.randn(1, 3, 8, 8)
    assert torch.equal(by_number(x, 5).sample, by_size(x, 5).sample)


@torch.no_grad()
@pytest.mark.parametrize("change", [{}, RESAMPLED, RESAMPLED | {"resnet_time_scale_shift": "scale_shift"}])
def test_every_residual_begins_at_zero(change):
    model = UNet2DModel(**{**TINY, **change}).eval()
    model.zero_residuals()
    blocks = [module for module in model.modules() if isinstance(module, ResnetBlock)]
    assert len(blocks) == (10 if change else 8)  # two that resample
    x, time = torch.randn(1, 3, 8, 8), torch.randn(1, 32)
    h = model.conv_in(x)
    assert torch.equal(model.down_blocks[0].resnets[0](h, time), h)
    if change:
        assert torch.equal(model.down_blocks[0].downsamplers[0](h, time), F.avg_pool2d(h, 2))
        deep = torch.randn(1, 16, 4, 4)
        assert torch.equal(
            model.up_blocks[0].upsamplers[0](deep, time), deep.repeat_interleave(2, 2).repeat_interleave(2, 3)
        )
    assert not model(x, 5).sample.any()


def test_a_fixed_number_of_heads_is_not_for_diffusers(tmp_path):
    model = UNet2DModel(**{**TINY, **HEADS})
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    assert json.loads((tmp_path / "config.json").read_text())["num_attention_heads"] == 2
    loaded = UNet2DModel.from_pretrained(tmp_path)
    assert loaded.config == model.config
    assert_equal_weights(loaded, model)
    theirs = pytest.importorskip("diffusers").UNet2DModel
    with pytest.raises(OSError, match="no file named diffusion_pytorch_model"):
        theirs.from_pretrained(tmp_path, low_cpu_mem_usage=False)


def test_without_it_the_key_is_not_written(model):
    """The namesake would warn of it."""
    assert "num_attention_heads" in model.config
    assert "num_attention_heads" not in model.to_json()


def test_folders_round_trip(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = UNet2DModel.from_pretrained(tmp_path)
    assert loaded.config == model.config
    assert_equal_weights(loaded, model)
    assert not loaded.training


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"center_input_sample": "no"}, "center_input_sample='no' must be true or false"),
        (
            {"time_embedding_type": "learned"},
            "time_embedding_type='learned' is not supported: use 'positional' or 'fourier'",
        ),
        (
            {"mid_block_type": "UNetMidBlock2DCrossAttn"},
            "mid_block_type='UNetMidBlock2DCrossAttn' is not supported: use 'UNetMidBlock2D' or None",
        ),
        ({"mid_block_scale_factor": 2}, "mid_block_scale_factor=2 is not supported: use 1"),
        ({"downsample_padding": 2}, "downsample_padding=2 is not supported: use 1 or 0"),
        ({"downsample_type": "fir"}, "downsample_type='fir' is not supported: use 'conv' or 'resnet'"),
        ({"upsample_type": "fir"}, "upsample_type='fir' is not supported: use 'conv' or 'resnet'"),
        ({"act_fn": "relu"}, "act_fn='relu' is not supported: use 'silu'"),
        (
            {"resnet_time_scale_shift": "spatial"},
            "resnet_time_scale_shift='spatial' is not supported: use 'default' or 'scale_shift'",
        ),
        ({"class_embed_type": "timestep"}, "class_embed_type='timestep' is not supported: use None"),
        ({"num_class_embeds": 10}, "num_class_embeds=10 is not supported: use None"),
        (
            {"down_block_types": ["SkipDownBlock2D", "DownBlock2D"]},
            "down_block_types='SkipDownBlock2D' is not supported:"
            " use 'DownBlock2D' or 'AttnDownBlock2D' or 'ResnetDownsampleBlock2D'",
        ),
        ({"block_out_channels": [8]}, "down_block_types has 2 entries, block_out_channels=[8] has 1"),
        ({"attention_head_dim": 17}, "attention_head_dim=17 is more than the 16 channels of a block"),
        ({"attention_head_dim": 0}, "attention_head_dim=0 is not a positive integer"),
        (HEADS | {"num_attention_heads": 3}, "num_attention_heads=3 does not divide the 16 channels of a block"),
        (HEADS | {"num_attention_heads": 0}, "num_attention_heads=0 is not a positive integer"),
        (
            {"num_attention_heads": 4},
            "num_attention_heads=4, attention_head_dim=4: only one of them can be given; set the other to null",
        ),
        ({"attn_norm_num_groups": 5}, "attn_norm_num_groups=5 does not divide 16, a width of block_out_channels"),
        ({"norm_num_groups": 16}, "norm_num_groups=16 does not divide 8, a width of block_out_channels"),
    ],
)
def test_impossible_arguments_get_one_clear_line(change, message):
    with pytest.raises(ValueError) as error:
        UNet2DModel(**{**TINY, **change})
    assert str(error.value) == message


def test_inputs_that_do_not_fit_get_one_clear_line(model):
    with pytest.raises(ValueError, match=r"UNet2DModel takes \(B, 3, H, W\), got .* \(1, 4, 8, 8\)$"):
        model(torch.randn(1, 4, 8, 8), 5)
    with pytest.raises(ValueError, match=r"multiples of 2, got 8x7$"):
        model(torch.randn(1, 3, 8, 7), 5)
    with pytest.raises(ValueError, match=r"timestep has shape \(3,\), the batch has 2 samples"):
        model(torch.randn(2, 3, 8, 8), torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match="class_labels were given"):
        model(torch.randn(1, 3, 8, 8), 5, class_labels=torch.tensor([1]))

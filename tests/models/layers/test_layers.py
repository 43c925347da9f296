import pytest
import torch
import torch.nn.functional as F

from ldm_lab.models.layers.attention import AttentionBlock
from ldm_lab.models.layers.resample import Downsample, Upsample
from ldm_lab.models.layers.resnet import ResnetBlock
from tests.helpers import assert_close_relative


def single_tap(conv, row, column):
    """Make a 3x3 convolution of one channel copy the pixel at this place of its window."""
    torch.nn.init.zeros_(conv.weight)
    torch.nn.init.zeros_(conv.bias)
    with torch.no_grad():
        conv.weight[0, 0, row, column] = 1


def test_downsample_of_autoencoders_looks_right_and_down():
    x = torch.arange(1.0, 17.0).view(1, 1, 4, 4)
    layer = Downsample(1, padding=0)
    single_tap(layer.conv, 0, 0)
    assert torch.equal(layer(x), x[:, :, ::2, ::2])
    single_tap(layer.conv, 2, 2)
    assert layer(x).flatten().tolist() == [11, 0, 0, 0]  # beyond the border only at the right and the bottom


def test_downsample_of_unets_is_centred():
    x = torch.arange(1.0, 17.0).view(1, 1, 4, 4)
    layer = Downsample(1, padding=1)
    single_tap(layer.conv, 1, 1)
    assert torch.equal(layer(x), x[:, :, ::2, ::2])
    single_tap(layer.conv, 0, 0)
    assert layer(x).flatten().tolist() == [0, 0, 0, 6]  # beyond the border only at the left and the top


def test_upsample_repeats_every_pixel_four_times():
    layer = Upsample(1)
    single_tap(layer.conv, 1, 1)
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])[None, None]
    assert layer(x)[0, 0].tolist() == [[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4]]


@pytest.mark.parametrize("dim_head", [None, 4])
def test_attention_is_a_softmax_over_positions_in_each_head(dim_head):
    torch.manual_seed(0)
    block = AttentionBlock(8, dim_head=dim_head, groups=2).double()
    x = torch.randn(2, 8, 3, 5, dtype=torch.float64)
    h = block.group_norm(x).flatten(2).transpose(1, 2)  # (B, C, H, W) -> (B, H*W, C)
    query, key, value = block.to_q(h), block.to_k(h), block.to_v(h)
    size, result = dim_head or 8, torch.empty_like(h)
    for start in range(0, 8, size):
        head = slice(start, start + size)
        weights = (query[..., head] @ key[..., head].transpose(1, 2) / size**0.5).softmax(-1)
        result[..., head] = weights @ value[..., head]
    expected = x + block.to_out(result).transpose(1, 2).reshape(x.shape)
    assert_close_relative(block(x).detach(), expected.detach(), 1e-9)


def test_attention_keys_and_heads():
    parts = ("group_norm", "to_q", "to_k", "to_v", "to_out.0")
    assert set(AttentionBlock(32).state_dict()) == {f"{p}.{kind}" for p in parts for kind in ("weight", "bias")}
    with pytest.raises(ValueError, match="attention_head_dim=33 is more than the 32 channels"):
        AttentionBlock(32, dim_head=33)
    assert AttentionBlock(32, dim_head=24).to_q.weight.shape == (24, 32)


def test_attention_by_number_of_heads():
    assert AttentionBlock(32, num_heads=4).dim_head == AttentionBlock(32, dim_head=8).dim_head == 8
    with pytest.raises(ValueError, match="num_attention_heads=5 does not divide the 32 channels"):
        AttentionBlock(32, num_heads=5)


def test_attention_without_normalisation():
    block = AttentionBlock(8, groups=None)
    assert not any("group_norm" in key for key in block.state_dict())
    assert torch.equal(block.group_norm(torch.ones(1, 8, 2, 2)), torch.ones(1, 8, 2, 2))


def test_resnet_keys():
    names = {key.rpartition(".")[0] for key in ResnetBlock(8, 16, groups=4, time_channels=5).state_dict()}
    assert names == {"norm1", "conv1", "time_emb_proj", "norm2", "conv2", "conv_shortcut"}
    names = {key.rpartition(".")[0] for key in ResnetBlock(8, 8, groups=4).state_dict()}
    assert names == {"norm1", "conv1", "norm2", "conv2"}


def test_resnet_passes_its_input_on():
    x = torch.randn(2, 8, 4, 4)
    same, wider = ResnetBlock(8, 8, groups=4), ResnetBlock(8, 12, groups=4)
    for block in (same, wider):
        torch.nn.init.zeros_(block.conv2.weight)
        torch.nn.init.zeros_(block.conv2.bias)
    assert torch.equal(same(x), x)
    assert torch.equal(wider(x), wider.conv_shortcut(x))


def test_resnet_adds_time_to_each_sample_alone():
    block = ResnetBlock(8, 8, groups=4, time_channels=5).eval()
    x, time = torch.randn(2, 8, 4, 4), torch.randn(2, 5)
    before = block(x, time)
    time[1] += 1
    after = block(x, time)
    assert torch.equal(before[0], after[0])
    assert not torch.allclose(before[1], after[1])


def test_resnet_scales_and_shifts_what_it_has_normalised():
    torch.manual_seed(0)
    block = ResnetBlock(8, 12, groups=4, time_channels=5, scale_shift=True).eval().double()
    x, time = torch.randn(2, 8, 4, 4, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    scale, shift = block.time_emb_proj(F.silu(time)).split(12, dim=1)
    h = block.norm2(block.conv1(F.silu(block.norm1(x))))
    h = torch.stack([h[:, c] * (1 + scale[:, c, None, None]) + shift[:, c, None, None] for c in range(12)], dim=1)
    assert_close_relative(block(x, time).detach(), (block.conv_shortcut(x) + block.conv2(F.silu(h))).detach(), 1e-12)


@pytest.mark.parametrize(("layer", "size"), [(torch.nn.AvgPool2d(2), 2), (torch.nn.Upsample(scale_factor=2.0), 8)])
def test_resnet_resamples_before_its_first_convolution(layer, size):
    block = ResnetBlock(8, groups=4, resample=layer)
    assert block.state_dict().keys() == ResnetBlock(8, groups=4).state_dict().keys()
    seen = []
    block.conv1.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x = torch.randn(1, 8, 4, 4)
    h = block(x)
    assert h.shape == (1, 8, size, size)
    assert torch.equal(seen[0], layer(F.silu(block.norm1(x))))
    torch.nn.init.zeros_(block.conv2.weight)
    torch.nn.init.zeros_(block.conv2.bias)
    assert torch.equal(block(x), layer(x))


def test_dropout_acts_in_training_only():
    block, x = ResnetBlock(8, 8, groups=4, dropout=0.5), torch.randn(1, 8, 4, 4)
    assert not torch.equal(block(x), block(x))
    block.eval()
    assert torch.equal(block(x), block(x))

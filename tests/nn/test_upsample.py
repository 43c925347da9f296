"""Doubling and convolving in one operation is what it says: every pixel four times, then a 3x3 convolution."""

import torch
import torch.nn.functional as F

from ldm_lab.nn.resample import Upsample


def test_it_equals_its_two_steps_with_gradients():
    torch.manual_seed(0)
    layer = Upsample(6).double()
    x = torch.randn(2, 6, 20, 18, dtype=torch.float64, requires_grad=True)
    target = torch.randn(2, 6, 40, 36, dtype=torch.float64)
    two_steps = layer.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    torch.testing.assert_close(layer(x), two_steps)
    inputs = (x, *layer.parameters())
    expected = torch.autograd.grad((two_steps * target).sum(), inputs)
    torch.testing.assert_close(torch.autograd.grad((layer(x) * target).sum(), inputs), expected)


@torch.no_grad()
def test_in_bfloat16_it_is_as_near_as_its_two_steps():
    torch.manual_seed(0)
    layer, x = Upsample(32), torch.randn(1, 32, 18, 18)
    exact = layer(x)
    layer, x = layer.bfloat16(), x.bfloat16()
    two_steps = layer.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))

    def error(y):
        return (y.float() - exact).square().mean().sqrt().item()

    assert error(layer(x)) < 1.5 * error(two_steps)


def test_small_maps_take_two_steps():
    layer, x = Upsample(4), torch.randn(1, 4, 16, 16)
    assert torch.equal(layer(x), layer.conv(F.interpolate(x, scale_factor=2.0, mode="nearest")))

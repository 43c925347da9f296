"""Doubling and convolving in one operation is what it says: every pixel four times, then a 3x3 convolution."""

import pytest
import torch
import torch.nn.functional as F

from ldm_lab.models.layers import cpu
from ldm_lab.models.layers.resample import Upsample


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


def two_steps(layer, x):
    return layer.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


@pytest.mark.skipif(not cpu.has_bfloat16(), reason="this CPU has no instructions for bfloat16: two steps are taken")
@torch.no_grad()
def test_in_bfloat16_it_is_as_near_as_its_two_steps():
    """Sums of up to four taps are rounded once more than the taps: with three roundings of equal size, by sqrt(4/3)."""
    torch.manual_seed(0)
    layer, x = Upsample(32), torch.randn(1, 32, 18, 18)
    exact = layer(x)
    layer, x = layer.bfloat16(), x.bfloat16()

    def error(y):
        return (y.float() - exact).square().mean().sqrt().item()

    assert error(layer(x)) < 1.5 * error(two_steps(layer, x))


def test_small_maps_take_two_steps():
    layer, x = Upsample(4), torch.randn(1, 4, 16, 16)
    assert torch.equal(layer(x), two_steps(layer, x))


def test_where_nobody_has_measured_it_takes_two_steps(monkeypatch):
    layer, x = Upsample(4), torch.randn(1, 4, 18, 18)
    expected = two_steps(layer, x)
    monkeypatch.setattr(Upsample, "_kernel", lambda _: pytest.fail("the transposed convolution was taken"))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "SVE256")
    assert torch.equal(layer(x), expected)
    monkeypatch.undo()
    assert layer.to("meta")(x.to("meta")).shape == expected.shape


def test_in_emulated_bfloat16_it_takes_two_steps(monkeypatch):
    monkeypatch.setattr(cpu, "has_bfloat16", lambda: False)
    layer, x = Upsample(4).bfloat16(), torch.randn(1, 4, 18, 18).bfloat16()
    assert torch.equal(layer(x), two_steps(layer, x))


def test_a_compiled_network_takes_two_steps():
    layer, seen = Upsample(4), []
    layer.forward = torch.compile(layer.forward, backend=lambda graph, _: seen.append(graph.code) or graph.forward)
    with torch.no_grad():
        layer(torch.randn(1, 4, 18, 18))
    assert "interpolate" in seen[0]
    assert "transpose" not in seen[0]

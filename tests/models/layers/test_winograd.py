"""Winograd's way to a 3x3 convolution gives what the convolution gives."""

import pytest
import torch
import torch.nn.functional as F

from ldm_lab.models.layers.winograd import Conv3x3, convolve


@pytest.mark.parametrize("shape", [(1, 1, 2, 2), (2, 3, 4, 10), (1, 5, 34, 6)])
def test_it_is_the_convolution(shape, monkeypatch):
    monkeypatch.setattr("ldm_lab.models.layers.winograd._CACHED", 500)  # several strips of rows, the last one shorter
    torch.manual_seed(0)
    x, weight = torch.randn(shape, dtype=torch.float64), torch.randn(7, shape[1], 3, 3, dtype=torch.float64)
    torch.testing.assert_close(convolve(x, weight), F.conv2d(x, weight, padding=1))


@pytest.fixture
def layer(monkeypatch):
    monkeypatch.setattr(Conv3x3, "WIDE", 2)
    monkeypatch.setattr(Conv3x3, "LARGE", 16)
    torch.manual_seed(0)
    return Conv3x3(3, 4)


def direct(layer, x):
    return F.conv2d(x, layer.weight, layer.bias, padding=1)


def taken(layer, x) -> bool:
    """Whether Winograd's way is; autograd tells."""
    return "Winograd" in type(layer(x).grad_fn).__name__


def test_it_has_the_convolutions_gradients_twice(layer):
    x, target = torch.randn(2, 3, 8, 6, requires_grad=True), torch.randn(2, 4, 8, 6)
    assert taken(layer, x)
    inputs = (x, layer.weight, layer.bias)

    def gradients(y):
        first = torch.autograd.grad((y * y * target).sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
        return y, *first, *second

    torch.testing.assert_close(gradients(layer(x)), gradients(direct(layer, x)), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_gradients_nobody_wants_are_left_out(layer, frozen):
    getattr(layer, frozen).requires_grad_(False)
    layer(torch.randn(1, 3, 4, 4)).sum().backward()
    assert getattr(layer, frozen).grad is None
    assert all(p.grad is not None for name, p in layer.named_parameters() if name != frozen)


def test_an_image_does_not_depend_on_the_others(layer):
    x = torch.randn(5, 3, 8, 8).to(memory_format=torch.channels_last)
    assert torch.equal(layer(x)[3:4], layer(x[3:4]))


def test_float32_loses_nothing():
    torch.manual_seed(0)
    layer, x = Conv3x3(256, 256), torch.randn(1, 256, 32, 32)
    exact = F.conv2d(x.double(), layer.weight.double(), layer.bias.double(), padding=1)
    assert taken(layer, x)
    assert (layer(x) - exact).abs().max() < 1e-5 * exact.abs().max()


def test_it_is_left_where_it_does_not_pay(layer, monkeypatch):
    x = torch.randn(1, 3, 8, 8)
    assert taken(layer, x)
    assert not taken(layer, x[:, :, :7])  # odd
    assert not taken(layer, x[:, :, :2, :2])  # small
    assert not taken(layer.double(), x.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not taken(layer.float(), x)
    assert not taken(Conv3x3(3, 1), x)  # narrow
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert not taken(layer, x)  # not measured


def test_the_result_lies_as_the_other_layers_want_it(layer):
    x = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    assert layer(x).is_contiguous(memory_format=torch.channels_last)


def test_a_compiled_network_leaves_the_choice_to_the_compiler(layer):
    seen = []
    layer.forward = torch.compile(layer.forward, backend=lambda graph, _: seen.append(graph.code) or graph.forward)
    with torch.no_grad():
        torch.testing.assert_close(layer(torch.ones(1, 3, 4, 4)), direct(layer, torch.ones(1, 3, 4, 4)))
    assert "conv" in seen[0]
    assert "bmm" not in seen[0]

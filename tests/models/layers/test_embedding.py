import math

import pytest
import torch

from ldm_lab.models.layers.embedding import TimestepEmbedding, sinusoid


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("shift", [0, 1])
def test_every_entry_is_a_wave_of_its_frequency(flip, shift):
    actual = sinusoid(torch.tensor([0, 7, 999]), 6, flip_sin_to_cos=flip, freq_shift=shift)
    for row, t in zip(actual.tolist(), (0, 7, 999), strict=True):
        angles = [t * 10_000 ** (-i / (3 - shift)) for i in range(3)]
        first, second = (math.cos, math.sin) if flip else (math.sin, math.cos)
        expected = [first(a) for a in angles] + [second(a) for a in angles]
        assert row == pytest.approx(expected, abs=1e-4)


def test_an_odd_length_ends_in_a_zero():
    actual = sinusoid(torch.tensor([3]), 5)
    assert actual.shape == (1, 5)
    assert actual[0, 4] == 0
    assert torch.equal(actual[:, :4], sinusoid(torch.tensor([3]), 4))


def test_it_is_float32_whatever_the_timesteps_are():
    for dtype in (torch.int64, torch.float64, torch.float32):
        assert sinusoid(torch.tensor([5], dtype=dtype), 8).dtype == torch.float32
    halfway = sinusoid(torch.tensor([5.5]), 8)
    assert not torch.allclose(halfway, sinusoid(torch.tensor([5]), 8))


def test_the_perceptron_has_the_names_of_diffusers():
    layer = TimestepEmbedding(8, 32)
    assert set(layer.state_dict()) == {f"linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")}
    assert layer(torch.randn(3, 8)).shape == (3, 32)

"""The spectrum of latents: noise is flat, waves lie where their frequency is."""

import math

import pytest
import torch

from ldm_lab.metrics.spectrum import high_frequency_share


def wave(frequency, height=16, width=24):
    """A wave along the width, `frequency` in cycles per position, on a large mean."""
    return (5 + torch.cos(2 * math.pi * frequency * torch.arange(width))).expand(2, 3, height, width)


@pytest.mark.parametrize(("frequency", "share"), [(1 / 24, 0), (6 / 24, 0), (7 / 24, 1), (0.5, 1)])
def test_a_wave_is_on_its_side_of_half_the_nyquist_frequency(frequency, share):
    assert high_frequency_share(wave(frequency)).item() == pytest.approx(share, abs=1e-5)
    assert high_frequency_share(wave(frequency).mT).item() == pytest.approx(share, abs=1e-5)


def test_noise_is_flat():
    noise = torch.randn(8, 4, 64, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    share = high_frequency_share(3 + noise)
    assert share.dtype == torch.float32
    assert share.item() == pytest.approx(1 - math.pi * 0.25**2, abs=0.01)


def test_energies_add_up():
    both = high_frequency_share(3 * wave(1 / 12) + 4 * wave(5 / 12))
    assert both.item() == pytest.approx(16 / 25, rel=1e-4)


def test_constant_latents_have_none():
    assert high_frequency_share(torch.full((1, 3, 8, 8), 2.5)).item() == 0
    assert high_frequency_share(torch.ones(1, 3, 1, 1)).item() == 0

"""Noise levels and how they are spread."""

import math

import pytest
import torch

from ldm_lab.diffusion.levels import SPREADS, Level, beta_quantile, flow, timesteps_at


def test_a_level_told_in_three_ways():
    for alpha_bar in (0.0, 1e-4, 0.3, 0.9999, 1.0):
        level = Level.of(alpha_bar)
        assert level.alpha**2 + level.sigma**2 == pytest.approx(1)
        if level.alpha:
            assert Level.of_ratio(level.sigma / level.alpha) == pytest.approx(level, rel=1e-9)
        assert math.exp(2 * level.log_snr) * level.sigma**2 == pytest.approx(level.alpha**2) or alpha_bar == 1
    assert Level.of_flow(0.25) == (0.75, 0.25, math.log(3))
    assert Level.of_flow(0.0).log_snr == math.inf
    assert Level.of_flow(1.0).log_snr == -math.inf


@pytest.mark.parametrize("spread", SPREADS.values(), ids=SPREADS)
def test_levels_go_from_the_first_to_the_last(spread):
    for count in (2, 3, 17, 1000):
        levels = spread(80.0, 0.002, count)
        assert levels.shape == (count,)
        assert levels.dtype == torch.float64
        assert (levels.diff() < 0).all()
        torch.testing.assert_close(levels[[0, -1]], torch.tensor([80.0, 0.002], dtype=torch.float64))
    assert float(spread(80.0, 0.002, 1)) == pytest.approx(80)


def test_what_is_even_of_which():
    assert SPREADS["use_karras_sigmas"](128.0**7, 0.0, 3).tolist() == pytest.approx([128.0**7, 64.0**7, 0])
    assert SPREADS["use_exponential_sigmas"](100.0, 0.01, 3).tolist() == pytest.approx([100, 1, 0.01])
    assert SPREADS["use_beta_sigmas"](3.0, 1.0, 3).tolist() == pytest.approx([3, 2, 1])


@pytest.mark.parametrize("shape", [0.3, 0.6, 1.0, 2.5])
def test_quantiles_of_the_beta_distribution(shape):
    stats = pytest.importorskip("scipy.stats")
    probabilities = torch.linspace(0, 1, 201, dtype=torch.float64)
    expected = torch.tensor(stats.beta.ppf(probabilities.numpy(), shape, shape))
    torch.testing.assert_close(beta_quantile(probabilities, shape), expected, rtol=1e-9, atol=1e-12)


def test_quantiles_that_are_known():
    probabilities = torch.linspace(0, 1, 11, dtype=torch.float64)
    torch.testing.assert_close(beta_quantile(probabilities, 1.0), probabilities)  # uniform
    arcsine = torch.sin(math.pi / 2 * probabilities) ** 2
    torch.testing.assert_close(beta_quantile(probabilities, 0.5), arcsine)


def test_a_shift_moves_a_straight_path_towards_noise():
    plain, moved = flow(1000, 1.0, 4), flow(1000, 3.0, 4)
    assert plain.tolist() == pytest.approx([0.999, 0.74925, 0.4995, 0.24975])
    assert (moved > plain).all()
    assert float(moved[2]) == pytest.approx(3 * 0.4995 / (1 + 2 * 0.4995))


def test_levels_lie_between_timesteps():
    table = torch.tensor([1.0, 10.0, 1000.0], dtype=torch.float64)
    ratios = torch.tensor([0.1, 1.0, 10**0.5, 10.0, 100.0, 1000.0, 1e9], dtype=torch.float64)
    assert timesteps_at(ratios, table).tolist() == pytest.approx([0, 0, 0.5, 1, 1.5, 2, 2])

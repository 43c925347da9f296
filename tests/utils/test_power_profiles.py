"""Power-function profiles: the paper's numbers, integrals, round trips."""

import itertools

import numpy as np
import pytest

from ldm_lab.utils.power_profiles import LONGEST, Profile, beta, check, fit, gamma, inner, length

LENGTHS = (0.01, 0.05, 0.1, 0.2, 0.28)
PAIRS = itertools.combinations_with_replacement(zip(LENGTHS, (3, 1, 2, 2.5, 0.5), strict=True), 2)


def profile(tau, length, time):
    """p(tau; t), as the paper defines it."""
    exponent = gamma(length)
    return np.where(tau <= time, (exponent + 1) * tau**exponent / time ** (exponent + 1), 0)


def test_exponents_of_the_paper():
    assert gamma(0.05) == pytest.approx(16.97, abs=0.005)
    assert gamma(0.10) == pytest.approx(6.94, abs=0.005)


@pytest.mark.parametrize("sigma", LENGTHS)
def test_a_length_is_the_deviation_of_its_profile(sigma):
    tau = np.linspace(0, 1, 200_001)
    density = profile(tau, sigma, 1.0)
    mean = np.trapezoid(tau * density, tau)
    assert np.trapezoid((tau - mean) ** 2 * density, tau) ** 0.5 == pytest.approx(sigma, rel=1e-4)
    assert length(gamma(sigma)) == pytest.approx(sigma, rel=1e-9)


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_inner_products_are_integrals(one, other):
    tau = np.linspace(0, 3, 300_001)
    integral = np.trapezoid(profile(tau, *one) * profile(tau, *other), tau)
    (a, t_a), (b, t_b) = one, other
    assert inner(gamma(a), t_a, gamma(b), t_b) == pytest.approx(integral, rel=1e-3, abs=1e-6)
    assert inner(gamma(b), t_b, gamma(a), t_a) == inner(gamma(a), t_a, gamma(b), t_b)


def test_decays_multiply_to_the_profile_whatever_the_batch():
    """The average of tau itself is the mean of the profile."""
    for batches in ([1] * 4000, [8] * 500, [8] * 250 + [16] * 125):
        seen, average = 0, 1e9
        for batch in batches:
            seen += batch
            decay = beta(gamma(0.1), seen, batch)
            average = decay * average + (1 - decay) * seen
        assert average == pytest.approx(4000 * (gamma(0.1) + 1) / (gamma(0.1) + 2), rel=3e-3)  # of whole steps


def test_a_stored_profile_is_itself_and_the_coefficients_sum_to_one():
    stored = [Profile(sigma, time) for time in range(1, 9) for sigma in (0.05, 0.1)]
    assert fit(stored, Profile(0.1, 5)) == ([float(one == Profile(0.1, 5)) for one in stored], 0.0)
    for sigma in (0.03, 0.07, 0.2):
        found = fit(stored, Profile(sigma, 8))
        assert sum(found.weights) == pytest.approx(1, abs=1e-9)
        tau = np.linspace(0, 8, 100_001)
        wanted = profile(tau, sigma, 8)
        error = sum(w * profile(tau, *one) for w, one in zip(found.weights, stored, strict=True)) - wanted
        norms = [np.trapezoid(values**2, tau) ** 0.5 for values in (error, wanted)]
        assert found.residual == pytest.approx(norms[0] / norms[1], rel=1e-2)


def test_more_snapshots_fit_better():
    residuals = []
    for count in (2, 8, 32, 128):
        stored = [Profile(sigma, time) for time in range(1, count + 1) for sigma in (0.05, 0.1)]
        residuals.append(fit(stored, Profile(0.03, count)).residual)
    assert residuals == sorted(residuals, reverse=True)
    assert residuals[0] > 0.1 > 0.001 > residuals[-1]


@pytest.mark.parametrize("value", [0, -0.1, LONGEST, 0.5, float("nan")])
def test_impossible_lengths_are_refused(value):
    with pytest.raises(ValueError, match=r"^ema=.*: a length must be above 0 and below 0\.289"):
        check(value, f"ema={value}")

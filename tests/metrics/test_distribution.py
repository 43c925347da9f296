"""Distances between sets of features: closed forms on Gaussians, limits, and torch-fidelity on the same features."""

import math

import pytest
import torch

from ldm_lab.metrics import distribution
from ldm_lab.metrics.distribution import Gaussian, frechet, frechet_distance, gaussian, kid, manifold, mean, nearest


def draw(count, dimension, seed=0, scale=1.0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dimension, dimension, generator=generator, dtype=torch.float64) / dimension**0.5
    return torch.randn(count, dimension, generator=generator, dtype=torch.float64) @ mixing * scale + shift


# Fréchet


def test_frechet_of_commuting_gaussians_is_the_closed_form():
    generator = torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64)).Q
    a, b = torch.rand(2, 6, generator=generator, dtype=torch.float64) + 0.1
    shift = torch.randn(6, generator=generator, dtype=torch.float64)
    one = Gaussian(torch.zeros(6).double(), axes @ a.diag() @ axes.T)
    other = Gaussian(shift, axes @ b.diag() @ axes.T)
    expected = float(shift.square().sum() + (a.sqrt() - b.sqrt()).square().sum())
    assert frechet_distance(one, other) == pytest.approx(expected, rel=1e-12)
    assert frechet_distance(other, one) == pytest.approx(expected, rel=1e-12)


def test_frechet_of_gaussians_that_do_not_commute():
    """tr(A B)^½ of 2 x 2 matrices is (tr AB + 2 sqrt(det AB))^½."""
    a = torch.tensor([[2.0, 0.5], [0.5, 1.0]]).double()
    b = torch.tensor([[1.0, -0.7], [-0.7, 3.0]]).double()
    product = a @ b
    root = math.sqrt(product.trace() + 2 * math.sqrt(product.det()))
    expected = float(a.trace() + b.trace()) - 2 * root
    assert frechet_distance(Gaussian(torch.zeros(2), a), Gaussian(torch.zeros(2), b)) == pytest.approx(expected)


def test_frechet_of_equal_sets_is_zero_also_where_the_covariance_is_singular():
    features = draw(10, 32)
    assert abs(frechet_distance(gaussian(features), gaussian(features))) < 1e-6
    assert frechet_distance(gaussian(features), gaussian(features + 1)) == pytest.approx(32, abs=1e-6)


def test_one_image_has_no_covariance():
    with pytest.raises(ValueError, match="1 image"):
        gaussian(torch.zeros(1, 3))


def test_statistics_stay_exact_far_from_zero():
    features = draw(1000, 4)
    assert torch.allclose(gaussian(features + 1e6).covariance, gaussian(features).covariance, atol=1e-8)


def test_the_interval_covers_the_distance_between_the_distributions():
    """Of 40 pairs of sets, about 38 intervals hold the value of a set ten times as large."""
    reference, everything = gaussian(draw(20_000, 3)), draw(40_000, 3, scale=1.3, shift=0.2)
    truth = frechet_distance(gaussian(everything), reference)
    inside = 0
    for part in everything.split(1000):
        found = frechet(part, reference, draws=60)
        assert found.low < found.value < found.high
        inside += found.low <= truth <= found.high
    assert 33 <= inside <= 40


def test_intervals_are_functions_of_the_seed():
    features, reference = draw(100, 3), gaussian(draw(100, 3, seed=1))
    assert frechet(features, reference, 20, seed=1) == frechet(features, reference, 20, seed=1)
    assert frechet(features, reference, 20, seed=1) != frechet(features, reference, 20, seed=2)
    assert frechet(features, reference, 0) == (frechet_distance(gaussian(features), reference), None, None)


def test_a_weighted_set_is_the_set_with_repeats():
    features = draw(5, 3)
    weights = torch.tensor([2.0, 0, 1, 3, 1]).double()
    repeated = gaussian(features.repeat_interleave(weights.long(), 0))
    for one, other in zip(distribution._weighted(features, weights), repeated, strict=True):
        assert torch.allclose(one, other, rtol=1e-12)


# KID


def plain_kid(x, y):
    kernel = lambda a, b: (a @ b.T / a.shape[1] + 1) ** 3  # noqa: E731
    within = [(kernel(z, z).sum() - kernel(z, z).diagonal().sum()) / (len(z) * (len(z) - 1)) for z in (x, y)]
    return float(sum(within) - 2 * kernel(x, y).mean())


@pytest.mark.parametrize("block", [1, 100, 2**24])
def test_kid_is_its_formula_whatever_is_held_at_a_time(monkeypatch, block):
    monkeypatch.setattr(distribution, "BLOCK", block)
    x, y = draw(40, 5), draw(30, 5, seed=1, shift=0.3)
    assert kid(x, y, draws=0).value == pytest.approx(plain_kid(x, y), rel=1e-10)


def test_kid_is_unbiased():
    """Of sets of the same distribution its mean is zero, that of the Fréchet distance is not."""
    parts = draw(4000, 4).split(20)
    found = torch.tensor([kid(x, y, draws=0).value for x, y in zip(parts[::2], parts[1::2], strict=True)])
    assert abs(found.mean()) < 4 * found.std() / len(found) ** 0.5
    assert found.min() < 0 < found.max()


def test_replicates_of_kid_leave_out_pairs_of_copies(monkeypatch):
    x, y = draw(6, 4), draw(5, 4, seed=1)
    weights = torch.tensor([2.0, 0, 1, 1, 1, 1]).double()
    replicates = []
    monkeypatch.setattr(distribution, "_resampled", lambda *_: [weights])
    monkeypatch.setattr(distribution, "_centred", lambda value, found: replicates.extend(found))
    kid(x, y)
    drawn = [0, 0, 2, 3, 4, 5]
    pairs = [(i, j) for i in drawn for j in drawn if i != j]  # places that differ, and images that differ
    within = sum(float((x[i] @ x[j] / 4 + 1) ** 3) for i, j in pairs) / len(pairs)
    among = plain_kid(y, y) + 2 * float(((y @ y.T / 4 + 1) ** 3).mean())  # twice the mean over pairs of y
    across = float(((x[drawn] @ y.T / 4 + 1) ** 3).mean())
    assert replicates == [pytest.approx(within + among / 2 - 2 * across, rel=1e-10)]


# Precision, recall, density, coverage


def test_equal_distributions_are_precise_and_covered():
    found = manifold(*draw(1600, 3).split(800), draws=0)
    assert all(found[name].value > 0.85 for name in ("precision", "recall", "coverage"))
    assert found["density"].value == pytest.approx(1, abs=0.15)


def test_a_lost_mode_costs_recall_and_coverage_not_precision():
    near, far = draw(300, 3), draw(300, 3, seed=1, shift=20.0)
    both = torch.cat([near, far])
    lost, added = manifold(near, both, draws=0), manifold(both, near, draws=0)
    assert lost["precision"].value > 0.9 > 0.55 > lost["recall"].value
    assert lost["coverage"].value < 0.55
    assert added["recall"].value > 0.9 > 0.55 > added["precision"].value


def test_far_sets_share_nothing():
    found = manifold(draw(50, 3), draw(50, 3, shift=100.0), draws=10)
    assert {name: one.value for name, one in found.items()} == dict.fromkeys(found, 0)


@pytest.mark.parametrize("block", [1, 100])
def test_neighbours_do_not_depend_on_what_is_held_at_a_time(monkeypatch, block):
    x, y = draw(40, 5), draw(30, 5, seed=1, shift=0.3)
    whole = manifold(x, y), nearest(x, y)
    monkeypatch.setattr(distribution, "BLOCK", block)
    parts = manifold(x, y), nearest(x, y)
    assert whole[0] == parts[0]
    assert torch.equal(whole[1][1], parts[1][1])


def test_too_few_images_have_no_neighbours():
    with pytest.raises(ValueError, match="5 images"):
        manifold(draw(5, 3), draw(20, 3))


def test_the_nearest_are_found():
    distances, places = nearest(torch.tensor([[0.0, 0], [9, 9]]), torch.tensor([[9.0, 8], [0, 2]]))
    assert distances.tolist() == [2, 1]
    assert places.tolist() == [1, 0]


def test_the_interval_of_a_mean_is_that_of_the_textbook():
    scores = torch.randn(2000, generator=torch.Generator().manual_seed(0))
    found = mean(scores, draws=2000)
    half = 1.96 * float(scores.std()) / 2000**0.5
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.1)


@pytest.mark.parametrize("hits", [0, 1, 2, 10, 38, 39, 40])
@pytest.mark.parametrize("draws", [1, 2, 7, 200])
def test_the_interval_of_a_share_is_one_of_shares(hits, draws):
    scores = torch.arange(40) < hits
    for seed in range(20):
        found = mean(scores, draws, seed)
        assert 0 <= found.low <= found.value <= found.high <= 1


def test_intervals_of_all_figures_stay_in_their_range():
    """Sets that are nearly all precise and covered, and nearly equal: chance alone would lead beyond."""
    x, y = draw(120, 2).split(60)
    for seed in range(5):
        found = manifold(x, torch.cat([x, y]), draws=20, seed=seed)
        for name in ("precision", "recall", "coverage"):
            assert 0 <= found[name].low <= found[name].value <= found[name].high <= 1, name
        assert found["density"].low >= 0
        same = frechet(x, gaussian(x), draws=20, seed=seed)
        assert 0 <= same.low <= same.value <= same.high


# torch-fidelity


def test_equals_torch_fidelity_on_the_same_features():
    fid, kid_of, prc = (pytest.importorskip(f"torch_fidelity.metric_{name}") for name in ("fid", "kid", "prc"))
    x, y = draw(200, 8).float(), draw(150, 8, seed=1, shift=0.2).float()
    statistics = [fid.fid_features_to_statistics(z.double()) for z in (x, y)]
    theirs = fid.fid_statistics_to_metric(*statistics, verbose=False)[fid.KEY_METRIC_FID]
    assert frechet_distance(gaussian(x), gaussian(y)) == pytest.approx(theirs, rel=1e-9)
    settings = {
        "kid_subsets": 1, "kid_subset_size": 150, "kid_kernel": "poly", "kid_kernel_poly_degree": 3,
        "kid_kernel_poly_gamma": None, "kid_kernel_poly_coef0": 1, "rng_seed": 0, "verbose": False,
    }  # fmt: skip
    theirs = kid_of.kid_features_to_metric(x[:150].double(), y.double(), **settings)[kid_of.KEY_METRIC_KID_MEAN]
    assert kid(x[:150], y, draws=0).value == pytest.approx(theirs, rel=1e-9)
    precision, recall = prc.calculate_precision_recall_full(x.double(), y.double(), neighborhood=3)
    ours = manifold(x, y, draws=0)
    assert (ours["precision"].value, ours["recall"].value) == pytest.approx((precision, recall), abs=1e-6)

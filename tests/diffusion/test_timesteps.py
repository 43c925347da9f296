import pytest
import torch

from ldm_lab.diffusion.timesteps import LowDiscrepancyTimesteps, UniformTimesteps, discretize, stratified

BOTH = pytest.mark.parametrize("draw", [UniformTimesteps(), LowDiscrepancyTimesteps()], ids=["uniform", "low"])


@BOTH
def test_a_timestep_depends_on_seed_and_position_alone(draw):
    whole = draw(3, range(24), 8, 1000)
    assert whole.dtype == torch.int64
    assert whole.shape == (24,)
    shuffled = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    assert torch.equal(draw(3, shuffled, 8, 1000), whole[shuffled])
    assert torch.equal(draw(3, [17], 8, 1000), whole[17:18])
    assert not torch.equal(draw(4, range(24), 8, 1000), whole)


@BOTH
def test_timesteps_are_in_range_and_uniform(draw):
    timesteps = draw(0, range(4000), 16, 10)
    counts = timesteps.bincount(minlength=10)
    assert len(counts) == 10
    assert ((counts - 400).abs() < 100).all()  # about five standard deviations of independent draws


@BOTH
def test_the_global_random_state_is_left_alone(draw):
    before = torch.get_rng_state()
    draw(0, range(4), 4, 1000)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("batch_size", [3, 16, 96])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_low_discrepancy_covers_every_stratum_once_over_all_ranks(batch_size, ranks):
    draw = LowDiscrepancyTimesteps()
    for batch in (0, 1, 57):
        positions = torch.arange(batch * batch_size, (batch + 1) * batch_size)
        parts = [draw(0, positions[rank::ranks], batch_size, 96 * 1000) for rank in range(ranks)]
        strata = torch.cat(parts) * batch_size // (96 * 1000)
        assert strata.sort().values.tolist() == list(range(batch_size))


def test_low_discrepancy_moves_from_batch_to_batch():
    draw = LowDiscrepancyTimesteps()
    offsets = {int(draw(0, [batch * 4], 4, 1000)) % 250 for batch in range(20)}
    assert len(offsets) > 10


def test_low_discrepancy_average_varies_less():
    def spread(draw):
        return draw(0, range(64 * 50), 64, 1000).reshape(50, 64).double().mean(1).std()

    assert spread(LowDiscrepancyTimesteps()) < spread(UniformTimesteps()) / 5


def test_discretize_reaches_both_ends_and_never_beyond():
    edge = torch.tensor([0.0, 0.001, 0.9989999, 1 - 2**-53], dtype=torch.float64)
    assert discretize(edge, 1000).tolist() == [0, 1, 998, 999]
    assert discretize(stratified(1000), 1000).tolist() == list(range(1000))
    assert discretize(stratified(1), 1000).tolist() == [500]

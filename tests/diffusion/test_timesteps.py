import pytest
import torch

from ldm_lab.data.sampler import StreamBatchSampler
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


def dealt(draw, rank, ranks, micro_batch, batches):
    """Timesteps of one device in `batches` global batches of 64, `(batches, 64 / ranks)`, as training deals them."""
    sampler = StreamBatchSampler(1000, 64, micro_batch, 0, rank, ranks, stop=64 * batches)
    drawn = [draw(0, [position for _, position in batch], 64, 1000) for batch in sampler]
    return torch.cat(drawn).view(batches, -1)


@pytest.mark.parametrize(("ranks", "micro_batch"), [(8, 8), (8, 2), (1, 8), (2, 16)])
def test_low_discrepancy_gives_each_device_and_micro_batch_the_whole_range(ranks, micro_batch):
    """A block of neighbouring strata has a mean that varies 2.5 times as much: 250 of 1000 against 101."""
    draw, batches = LowDiscrepancyTimesteps(), 200
    found = [dealt(draw, rank, ranks, micro_batch, batches) for rank in range(ranks)]
    whole = torch.cat(found, dim=1)
    assert torch.equal(whole.sort().values, dealt(draw, 0, 1, 64, batches).sort().values)
    gaps = whole.sort().values.diff()  # one timestep in each 64th of the range
    assert gaps.min() >= 1000 // 64
    assert gaps.max() <= 1000 // 64 + 1
    for share in found:
        means = share.view(-1, micro_batch).double().mean(1)
        independent = 1000 / 12**0.5 / micro_batch**0.5
        assert means.std() < 1.15 * independent  # of 200 means and more: three standard errors


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

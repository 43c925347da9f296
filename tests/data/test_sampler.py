from itertools import islice

import pytest
import torch

from ldm_lab.data.sampler import StreamBatchSampler, accumulation, permutation, shard_order


def batches(count, size=10, total=12, batch=12, seed=0, rank=0, world=1, start=0):
    return list(islice(StreamBatchSampler(size, total, batch, seed, rank, world, start), count))


@pytest.mark.parametrize(("batch", "world"), [(12, 1), (4, 1), (1, 1), (6, 2), (3, 2), (2, 3), (1, 12), (4, 3)])
def test_every_split_makes_the_same_global_batches(batch, world):
    whole = batches(4)
    steps = accumulation(12, batch, world)
    ranks = [batches(4 * steps, batch=batch, rank=rank, world=world) for rank in range(world)]
    for number, expected in enumerate(whole):
        micro = slice(number * steps, (number + 1) * steps)
        assert sorted(pair for rank in ranks for part in rank[micro] for pair in part) == sorted(expected)
    assert all(len(part) == batch for rank in ranks for part in rank)


def test_micro_batch_k_of_rank_r_begins_where_it_should():
    first = batches(5, batch=2, rank=1, world=3)
    assert [part[0][1] for part in first] == [2, 8, 12 + 2, 12 + 8, 24 + 2]  # g * G + (k * W + r) * b


@pytest.mark.parametrize("size", [1, 5, 12, 100])
def test_every_epoch_is_a_permutation(size):
    pairs = [pair for batch in batches(3 * size, size=size, total=4, batch=2) for pair in batch]
    indices = [index for index, _ in pairs]
    assert [position for _, position in pairs] == list(range(6 * size))
    epochs = [indices[epoch * size : (epoch + 1) * size] for epoch in range(6)]
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    if size > 5:
        assert len({tuple(epoch) for epoch in epochs}) == 6


def test_order_depends_on_the_seed():
    assert batches(2, size=100) != batches(2, size=100, seed=1)
    assert permutation(100, 0, 0).tolist() != permutation(100, 0, 1).tolist()


@pytest.mark.parametrize("start", [12, 36, 1200])
def test_starting_later_continues_the_same_stream(start):
    sampler = StreamBatchSampler(10, 12, 3, seed=0, rank=1, world_size=2)
    whole = list(islice(sampler, start // 6 + 4))
    assert batches(4, batch=3, rank=1, world=2, start=start) == whole[-4:]
    assert list(islice(sampler, 4)) == whole[:4]  # iterating again begins again


def test_devices_may_change_between_start_and_resume():
    rest = [pair for batch in batches(2, start=24) for pair in batch]
    ranks = [batches(4, batch=2, rank=rank, world=3, start=24) for rank in range(3)]
    assert sorted(pair for rank in ranks for batch in rank for pair in batch) == sorted(rest)


@pytest.mark.parametrize(
    ("total", "batch", "world", "advice"),
    [
        (10, 4, 2, ["data.global_batch_size=8 or 16", "data.batch_size=5"]),
        (4, 8, 1, ["data.global_batch_size=8", "data.batch_size=4"]),
        (48, 7, 4, ["data.global_batch_size=28 or 56", "data.batch_size=6"]),
        (7, 2, 2, ["data.global_batch_size=4 or 8"]),
    ],
)
def test_indivisible_batches_are_refused_with_the_nearest_possible_ones(total, batch, world, advice):
    with pytest.raises(ValueError) as error:
        StreamBatchSampler(10, total, batch, seed=0, world_size=world)
    message = str(error.value)
    for part in [f"data.global_batch_size={total} ", f"data.batch_size={batch} ", f"{world} device", *advice]:
        assert part in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "wrong",
    [{"start": 6}, {"start": -12}, {"size": 0}, {"rank": 1}, {"batch": 0}, {"total": 0}],
)
def test_impossible_arguments_are_refused(wrong):
    with pytest.raises(ValueError):
        batches(1, **wrong)


# --- archive by archive

GROUPS = torch.arange(200) % 20  # ten images in each of twenty archives


@pytest.mark.parametrize("window", [1, 4, 50])
def test_an_epoch_by_shards_is_a_permutation_with_few_archives_at_a_time(window):
    orders = [shard_order(GROUPS, window, 0, epoch) for epoch in range(3)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(200))
        places = GROUPS[order]
        spans = [(places == shard).nonzero().flatten().tolist() for shard in range(20)]
        open_at = [sum(min(span) <= place <= max(span) for span in spans) for place in range(200)]
        assert max(open_at) <= window + 1
    assert len({tuple(order.tolist()) for order in orders}) == 3
    assert shard_order(GROUPS, window, 0, 2).tolist() == orders[2].tolist()
    assert shard_order(GROUPS, window, 1, 2).tolist() != orders[2].tolist()


def test_the_order_by_shards_is_a_function_of_the_position():
    def pairs(count, **settings):
        sampler = StreamBatchSampler(200, 12, seed=3, groups=GROUPS, window=3, **settings)
        return [pair for batch in islice(sampler, count) for pair in batch]

    whole = pairs(60, batch_size=12)
    ranks = [pairs(80, batch_size=3, rank=rank, world_size=2, start=12 * 20) for rank in range(2)]
    assert sorted(ranks[0] + ranks[1], key=lambda pair: pair[1]) == whole[12 * 20 :]

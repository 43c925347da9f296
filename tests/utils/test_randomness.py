"""Random numbers as a function of (seed, stream, position)."""

import itertools

import torch

from ldm_lab.utils.randomness import generator, normal, uniform


def draw(*key):
    return torch.randn(4, generator=generator(*key)).tolist()


def test_the_same_key_gives_the_same_numbers():
    assert draw(1, "noise", 2, 3) == draw(1, "noise", 2, 3)
    assert generator(1, "noise").device == torch.device("cpu")


def test_every_part_of_the_key_matters():
    keys = [
        (0, "noise", 5),
        (1, "noise", 5),
        (0, "crop", 5),
        (0, "noise", 6),
        (0, "noise"),
        (0, "noise", 5, 0),
        (0, "noise", 0, 5),
        (0, "noise", 1, 23),
        (0, "noise", 12, 3),
        (0, "noise", 123),
    ]
    for one, other in itertools.combinations(keys, 2):
        assert draw(*one) != draw(*other), (one, other)


def test_no_two_positions_share_a_seed():
    seeds = {generator(1, "sample", position).initial_seed() for position in range(50_000)}
    assert len(seeds) == 50_000
    assert max(seeds) < 2**32, "torch's CPU generator would drop the bits above"


def test_the_global_generator_is_neither_used_nor_changed():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    first = draw(0, "noise", 1), normal(0, "noise", [1, 2], (2,)), uniform(0, "noise", [1, 2])
    assert torch.equal(torch.rand(3), expected)
    assert draw(0, "noise", 1) == first[0]


def test_a_row_does_not_depend_on_the_others():
    whole = normal(3, "noise", range(10), (2, 4, 5))
    assert whole.shape == (10, 2, 4, 5)
    assert whole.dtype == torch.float32
    assert torch.equal(normal(3, "noise", [7, 2], (2, 4, 5)), whole[[7, 2]])
    assert torch.equal(normal(3, "noise", torch.tensor([4]), (2, 4, 5)), whole[[4]])
    numbers = uniform(3, "timestep", range(10))
    assert numbers.shape == (10,)
    assert numbers.dtype == torch.float64
    assert torch.equal(uniform(3, "timestep", [9, 0]), numbers[[9, 0]])


def test_the_noise_is_standard_normal_and_white():
    noise = normal(0, "noise", range(400), (100,))
    assert noise.mean().abs() < 5 / 200  # five standard errors of 40,000 numbers
    assert (noise.var() - 1).abs() < 5 * (2 / 40_000) ** 0.5
    neighbours = (noise[:-1] * noise[1:]).mean()  # positions beside each other have seeds that are not
    assert neighbours.abs() < 5 / 200
    other_seed = normal(1, "noise", range(400), (100,))
    assert (noise * other_seed).mean().abs() < 5 / 200


def test_the_uniform_numbers_fill_their_interval():
    numbers = uniform(0, "timestep", range(2000))
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts = torch.histc(numbers, bins=10, min=0, max=1)
    assert (counts - 200).abs().max() < 5 * (200 * 0.9) ** 0.5


def test_the_numbers_are_drawn_on_the_cpu_whatever_the_default_device():
    with torch.device("meta"):
        noise, numbers = normal(0, "noise", [1], (3,)), uniform(0, "noise", [1])
    assert torch.equal(noise, normal(0, "noise", [1], (3,)))
    assert torch.equal(numbers, uniform(0, "noise", [1]))


def test_recorded_numbers():
    """A run that was started with an older version goes on with the same numbers."""
    recorded = [0.042597558154, 0.098883019621, 0.698511415164]
    torch.testing.assert_close(uniform(0, "noise", [0, 1, 10**9]), torch.tensor(recorded, dtype=torch.float64))

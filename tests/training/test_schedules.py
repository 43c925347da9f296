from itertools import pairwise

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from ldm_lab.training.schedules import ConstantWithWarmup, CosineWithWarmup, LinearWithWarmup


def test_warmup_of_lsun_churches():
    schedule = ConstantWithWarmup(warmup_images=10_000 * 96)
    steps = [0, 1, 5_000, 9_999, 10_000, 400_000]
    expected = [1e-6, 1e-6 + (1 - 1e-6) / 10_000, (1 + 1e-6) / 2, 0.9999, 1.0, 1.0]
    assert [schedule(step * 96) for step in steps] == pytest.approx(expected, rel=1e-6)


def test_without_warmup_the_rate_is_constant():
    assert ConstantWithWarmup()(0) == ConstantWithWarmup()(10**9) == 1.0


def test_cosine_begins_full_is_half_in_the_middle_and_ends_at_final():
    schedule = CosineWithWarmup(warmup_images=100, max_images=1100, final=0.2)
    values = [schedule(n) for n in (100, 600, 1100, 10**6)]
    assert values == pytest.approx([1.0, 0.6, 0.2, 0.2])
    assert schedule(50) == pytest.approx(0.5, abs=1e-6)


def test_cosine_falls_without_jumps():
    schedule = CosineWithWarmup(warmup_images=10, max_images=1000)
    values = [schedule(n) for n in range(10, 1001)]
    steps = [a - b for a, b in pairwise(values)]
    assert min(steps) > 0
    assert max(steps) < 2 / 990  # the steepest slope of half a cosine is π/2 over its length


def test_linear_falls_straight_to_zero():
    schedule = LinearWithWarmup(warmup_images=100, max_images=1100)
    values = [schedule(n) for n in (100, 350, 600, 1100, 10**6)]
    assert values == pytest.approx([1.0, 0.75, 0.5, 0.0, 0.0])
    assert schedule(50) == pytest.approx(0.5, abs=1e-6)


@pytest.mark.parametrize("batch_size", [8, 16])
def test_the_rate_depends_on_images_not_on_the_batch_size(batch_size):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3.0)
    schedule = CosineWithWarmup(warmup_images=32, max_images=320)
    scheduler = LambdaLR(optimizer, lambda step: schedule(step * batch_size))
    for _ in range(160 // batch_size):
        optimizer.step()
        scheduler.step()
    assert scheduler.get_last_lr() == pytest.approx([3.0 * schedule(160)])


@pytest.mark.parametrize("kind", [CosineWithWarmup, LinearWithWarmup])
@pytest.mark.parametrize("total", [64, 640])
def test_a_run_shorter_than_the_warmup_ends_within_it(kind, total):
    schedule, warmup = kind(warmup_images=640, max_images=total), ConstantWithWarmup(640)
    assert [schedule(n) for n in range(total + 1)] == [warmup(n) for n in range(total + 1)]


@pytest.mark.parametrize("kind", [ConstantWithWarmup, CosineWithWarmup, LinearWithWarmup])
def test_negative_warmup_is_refused(kind):
    lengths = {} if kind is ConstantWithWarmup else {"max_images": 10}
    with pytest.raises(ValueError, match="warmup_images=-3"):
        kind(-3, **lengths)

"""The estimate of memory against what the allocator says, and how it grows."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from ldm_lab.training.planning.estimate import LiveBytes, NoTrainer, estimate
from ldm_lab.utils.pixels import RGB_8_BIT
from tests.trained import undisturbed
from tests.training.stages import tiny

SIZE = (32, 32)


def test_a_storage_counts_once_and_while_it_lives():
    with LiveBytes() as live:
        x = torch.empty(1000)
        assert live.now == 4000
        view = x.view(10, 100)[2:]
        assert live.now == 4000
        y = x * 2
        del x
        assert (live.now, live.peak) == (8000, 8000)
        del view
        assert (live.now, live.peak) == (4000, 8000)
        torch.empty(2000)
        assert (live.now, live.peak) == (4000, 12000)
        assert len(y) == 1000


def profiled(module, batch_size):
    """Bytes that the allocator gives out, at the peak of a second step on real tensors."""
    trainer = NoTrainer(batch_size, SIZE, RGB_8_BIT)
    module.trainer = trainer
    module.log = module.log_dict = lambda *_, **__: None
    module.setup("fit")
    batch = {"image": torch.zeros(batch_size, 3, *SIZE), "position": torch.arange(batch_size)}
    batch = module.on_before_batch_transfer(batch, 0)
    optimizer = module.make_optimizer(module.parameter_groups())
    for _ in range(2):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            module.training_step(batch, 0).backward()
            optimizer.step()
    now = peak = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


# Of VGG's first maps, large beside networks this small, two more are there for a moment than an estimate sees.
@pytest.mark.parametrize(
    ("experiment", "close"),
    [("avatars/autoencoder", 0.06), ("lsun_churches/autoencoder", 0.2), ("celebahq/diffusion", 0.06)],
)
def test_an_estimate_is_what_the_allocator_sees(experiment, close):
    module, _, _ = tiny(experiment)
    work = estimate(module, SIZE, 4).work
    with undisturbed():  # one thread: kernels give each thread a buffer of its own, and these networks are tiny
        assert work == pytest.approx(profiled(module, 4), rel=close)


def test_what_is_held_is_weights_gradients_moments_and_average():
    module, _, _ = tiny("celebahq/diffusion")
    unet, first = (sum(p.numel() for p in network.parameters()) for network in (module.unet, module.autoencoder))
    assert estimate(module, SIZE, 1).held == pytest.approx(4 * (5 * unet + first), rel=0.05)


def test_work_grows_with_images_and_pixels_and_shrinks_in_bfloat16():
    module, _, _ = tiny("avatars/autoencoder")
    one, two, four = (estimate(module, SIZE, n).work for n in (1, 2, 4))
    assert four - two == pytest.approx(2 * (two - one), rel=0.1)
    assert estimate(module, (32, 64), 4).work == pytest.approx(2 * four, rel=0.1)
    assert estimate(module, SIZE, 4, "bf16-mixed").work < 0.75 * four


def test_an_estimate_takes_no_memory_and_leaves_the_stage_as_it_was():
    module, _, _ = tiny("celebahq/autoencoder")
    before = {key: value.clone() for key, value in module.state_dict().items()}
    assert estimate(module, (1024, 1024), 64).work > 2**36  # more than there is
    assert all(
        type(value) is torch.Tensor and torch.equal(value, before[key]) for key, value in module.state_dict().items()
    )
    assert all(parameter.grad is None for parameter in module.parameters())
    assert (module.images_seen, module._trainer) == (0, None)

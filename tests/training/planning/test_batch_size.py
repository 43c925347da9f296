"""`data.batch_size`: what it does not change, and how `auto` finds it."""

import copy
import math
import tempfile
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from ldm_lab.training.callbacks.ranks import SmallestBatchSize
from ldm_lab.training.planning import batch_size, memory
from ldm_lab.training.run import set_lengths
from tests.trained import undisturbed
from tests.training.stages import tiny, trial
from tests.training.test_ddp import TWO, command

STAGES = {  # and a learning rate that keeps them together
    "avatars/autoencoder": 1e-2,
    "lsun_churches/autoencoder": 1e-5,
    "avatars/diffusion": 1e-2,
    "lsun_churches/diffusion": 1e-2,
}


def learned(module, data, make_trainer, size, rate):
    """What three steps of plain descent change in the weights, one after the other `(N,)`.

    Adam would make whole steps of gradients that are but rounding.
    """
    trained, data.batch_size = copy.deepcopy(module), size
    trained.make_optimizer = partial(torch.optim.SGD, lr=rate)
    with undisturbed(), tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(logger=False, limit_val_batches=0, default_root_dir=folder)
        set_lengths(trainer, data, 24)
        trainer.fit(trained, data)
    assert (trainer.global_step, trainer.accumulate_grad_batches) == (3, 8 // size)
    pairs = zip(trained.state_dict().items(), module.state_dict().values(), strict=True)
    return torch.cat(
        [(new.double() - old.double()).flatten() for (key, new), old in pairs if not key.startswith("loss.")]
    )


@pytest.mark.parametrize(("experiment", "rate"), STAGES.items())
def test_results_do_not_depend_on_how_a_batch_is_split(experiment, rate):
    """But for rounding. (A discriminator would see it: it normalises over what is held at a time.)"""
    stage = tiny(experiment)
    whole = learned(*stage, 8, rate)
    assert whole.norm() > 1e-3
    for size in (4, 2, 1):
        assert (learned(*stage, size, rate) - whole).norm() < 1e-4 * whole.norm()


@pytest.mark.parametrize(
    ("share", "allowed", "expected", "most"),
    [
        (48, 980, 48, 1),
        (48, 979, 24, 5),
        (48, 500, 24, 5),
        (48, 499, 16, 5),
        (48, 40, 1, 5),
        (48, 39, None, 5),
        (7, 159, 1, 3),
        (1, 40, 1, 1),
    ],
)
def test_the_largest_divisor_that_fits(share, allowed, expected, most):
    """On a device that needs 20 bytes and 20 an image, and runs out of memory where that is more than allowed."""
    tried = []

    def needs(images):
        tried.append(images)
        return 20 + 20 * images if 20 + 20 * images <= allowed else math.inf

    assert batch_size.largest(share, needs, allowed) == expected
    assert len(tried) <= most


@pytest.mark.parametrize("size", [8, 4, 1])
def test_auto_takes_what_a_budget_allows(size, capsys):
    tried = trial("celebahq/diffusion", "data.batch_size=auto")
    tried.needs = lambda images: images * 2**30
    assert batch_size.find(tried, budget=lambda _: size * 2**30) == size
    steps = "1 micro-batch a step" if size == 8 else f"{8 // size} micro-batches a step"
    there = memory.readable(memory.total(torch.device("cpu")))
    assert capsys.readouterr().out == f"data.batch_size=auto: {size} ({steps}, {size} GB of {there})\n"


def test_auto_refuses_where_one_image_does_not_fit(monkeypatch):
    monkeypatch.setattr(memory, "free", lambda _: 2**20)
    with pytest.raises(
        ValueError, match=r"data\.image_size=\[32,32\]: training the diffusion stage takes more than the 1 MB"
    ):
        batch_size.find(trial())


def test_processes_on_one_cpu_share_its_memory():
    alone, beside = trial("celebahq/diffusion"), trial("celebahq/diffusion", *TWO)
    assert (alone.portion(100), beside.portion(100)) == (100, 50)
    assert (alone.share, beside.share) == (8, 4)
    trained = sum(p.numel() * 4 for p in beside.module.unet.parameters())
    assert beside.needs(2) == pytest.approx(alone.needs(2) + trained, rel=1e-6)  # gradients on their way


def test_a_global_batch_that_devices_cannot_share_is_refused_at_once():
    with pytest.raises(
        ValueError, match=r"data\.global_batch_size=7 is not divisible .*: use data\.global_batch_size=6"
    ):
        trial("celebahq/diffusion", *TWO, "data.batch_size=auto", "data.global_batch_size=7")


class Ranks:
    """A trainer beside others, of which one has found `other`."""

    def __init__(self, data, other, world_size=2):
        self.datamodule, self.world_size, self.is_global_zero, self.accumulate_grad_batches = data, world_size, True, 1
        self.strategy = SimpleNamespace(root_device=torch.device("cpu"), reduce=self.reduce)
        self.other = other

    def reduce(self, tensor, reduce_op):
        assert reduce_op == "min"
        return tensor.clamp(max=self.other)


@pytest.mark.parametrize(
    ("mine", "other", "world_size", "expected", "said"),
    [
        (4, 2, 2, (2, 2), "data.batch_size=2 fits all devices\n"),
        (2, 4, 2, (2, 2), ""),
        (None, 4, 2, (None, 1), ""),
        (4, 2, 1, (4, 1), ""),
    ],
)
def test_all_devices_take_the_smallest(mine, other, world_size, expected, said, capsys):
    _, data, _ = tiny("celebahq/diffusion", f"data.batch_size={mine or 'null'}")
    trainer = Ranks(data, other, world_size)
    SmallestBatchSize().setup(trainer, None, "fit")
    assert (data.batch_size, trainer.accumulate_grad_batches) == expected
    assert capsys.readouterr().out == said


@pytest.mark.soak
def test_two_processes_agree(tmp_path):
    """The second finds room for less than the first."""
    found = (
        "plugins=[tests]",
        "+callbacks.found._target_=tests.callbacks.FoundBatchSizes",
        "+callbacks.found.sizes=[4,1]",
    )
    done = command(*TWO, f"paths.runs={tmp_path}", *found)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("data.batch_size=1 fits all devices") == 2  # stages
    assert (tmp_path / "celebahq/model_index.json").is_file()

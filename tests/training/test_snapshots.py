"""Snapshots: when they are taken, what they hold, what a kill or a resume leaves of them."""

import copy
import errno
import os

import pytest
import torch

from ldm_lab import LDMPipeline
from ldm_lab.checkpoints.locate import snapshots
from ldm_lab.training.callbacks.snapshots import Snapshots
from ldm_lab.training.diffusion_module import DiffusionModule
from ldm_lab.training.ema import EMA
from tests.helpers import GOLDEN, contents
from tests.trained import copy as copy_of
from tests.trained import train
from tests.training.test_callbacks import FakeTrainer

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def module():
    """A stage 2 whose average is not its UNet."""
    parts = LDMPipeline.from_pretrained(GOLDEN / "diffusers/ldm_tiny").components
    training = {"optimizer": None, "schedule": None}
    module = DiffusionModule(parts["unet"], parts["vqvae"], parts["scheduler"], objective=None, ema=EMA, **training)
    with torch.no_grad():
        module.ema.model.conv_out.bias.fill_(0.5)
    return module


def trainer(module, steps, **more):
    made = FakeTrainer(steps, **more)
    made.module, module.images_seen = module, made.module.images_seen
    return made


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize(("interval", "expected"), [(16, [16, 32]), (20, [24, 40]), (1000, []), (None, [])])
def test_they_are_counted_in_images_and_never_inside_a_step(tmp_path, module, accumulation, interval, expected):
    trainer(module, steps=5, accumulation=accumulation).train(Snapshots(tmp_path / "snapshots", interval))
    assert list(snapshots(tmp_path / "snapshots")) == expected
    assert not list(tmp_path.rglob("*.tmp"))


def test_each_is_the_averaged_model_of_its_time(tmp_path, module):
    callback, averages = Snapshots(tmp_path, 8), {}
    for module.images_seen in (8, 16):
        callback.take(module)
        averages[module.images_seen] = copy.deepcopy(module.ema.model.state_dict())
        with torch.no_grad():
            module.ema.model.conv_out.bias.add_(1)
    for images, folder in snapshots(tmp_path).items():
        pipe = LDMPipeline.from_pretrained(folder)
        for key, value in pipe.unet.state_dict().items():
            assert torch.equal(value, averages[images][key]), key
        assert torch.equal(pipe.vqvae.encoder.conv_in.weight, module.autoencoder.encoder.conv_in.weight)
        assert pipe.scheduler.config == module.scheduler.config


@pytest.mark.parametrize("links", [True, False])
def test_what_does_not_change_lies_on_disk_once(tmp_path, module, monkeypatch, links):
    if not links:

        def refuse(*_):
            raise OSError(errno.EPERM, "this disk has no links")

        monkeypatch.setattr(os, "link", refuse)
    callback = Snapshots(tmp_path, 8)
    for module.images_seen in (8, 16, 24):
        callback.take(module)
        with torch.no_grad():
            module.ema.model.conv_out.bias.add_(1)
    files = {
        part: [(folder / part / WEIGHTS).stat() for folder in snapshots(tmp_path).values()]
        for part in ("vqvae", "unet")
    }
    assert len({stat.st_ino for stat in files["vqvae"]}) == (1 if links else 3)
    assert len({stat.st_ino for stat in files["unet"]}) == 3
    assert len({stat.st_size for stats in files.values() for stat in stats}) == 2


def test_another_first_stage_is_never_mixed_in(tmp_path, module):
    """A start that failed before its first checkpoint binds nobody; its snapshot may be there all the same."""
    callback = Snapshots(tmp_path, 8)
    module.images_seen = 8
    callback.take(module)
    with torch.no_grad():
        module.autoencoder.decoder.conv_out.bias.add_(1)
    module.images_seen = 16
    callback.take(module)
    pipe = LDMPipeline.from_pretrained(tmp_path / "000000016")
    assert torch.equal(pipe.vqvae.decoder.conv_out.bias, module.autoencoder.decoder.conv_out.bias)


def test_a_killed_process_leaves_no_half_snapshot(tmp_path, module, monkeypatch):
    module.images_seen = 8
    Snapshots(tmp_path, 8).take(module)
    before = contents(tmp_path)

    def die(*_):
        raise KeyboardInterrupt

    module.images_seen = 16
    with monkeypatch.context() as patch:
        patch.setattr("ldm_lab.training.callbacks.snapshots.share", die)
        with pytest.raises(KeyboardInterrupt):
            Snapshots(tmp_path, 8).take(module)
    assert contents(tmp_path) != before
    assert list(snapshots(tmp_path)) == [8]
    Snapshots(tmp_path, 8).on_train_start(trainer(module, steps=1), module)
    assert contents(tmp_path) == before


def test_a_snapshot_from_before_a_resume_is_replaced(tmp_path, module):
    module.images_seen = 8
    Snapshots(tmp_path, 8).take(module)
    before = contents(tmp_path)
    Snapshots(tmp_path, 8).take(module)
    assert contents(tmp_path) == before  # the same training
    with torch.no_grad():
        module.ema.model.conv_out.bias.fill_(7)
    Snapshots(tmp_path, 8).take(module)  # another, after resume=force
    assert float(LDMPipeline.from_pretrained(tmp_path / "000000008").unet.conv_out.bias[0].detach()) == 7


def test_rank_0_alone_writes(tmp_path, module):
    other = trainer(module, steps=2)
    other.is_global_zero = False
    other.train(Snapshots(tmp_path, 8))
    assert not list(tmp_path.iterdir())


def test_a_run_that_goes_on_takes_them(tiny_runs, tmp_path):
    runs = copy_of(tiny_runs, tmp_path)
    train(runs, "experiment=celebahq/diffusion", "max_images=80", "snapshots=8")
    stage = runs / "celebahq/diffusion"
    taken = snapshots(stage / "snapshots")
    assert list(taken) == [72, 80]
    final = {name: file for name, file in contents(stage / "final").items() if name not in ("README.md", "samples.png")}
    assert contents(taken[80]) == final != contents(taken[72])

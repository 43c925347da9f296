"""The checks of the doctor during training: said once, in words; the images that training begins with."""

import math
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from ldm_lab.tools.doctor import main as doctor
from ldm_lab.training.callbacks.health import Health, as_images
from tests.tools.report.runs import write_stage
from tests.trained import last_checkpoint, train

HOT = (
    "experiment=avatars/autoencoder",
    "validate_every=8",
    "model.optimizer.lr=30",
    "model.schedule.warmup_images=640",
)


def warnings(capsys):
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: autoencoder, since")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("hot")


def test_a_broken_training_is_said_once_also_after_a_resume(runs, capsys):
    train(runs, *HOT, "max_images=48")
    said = warnings(capsys)
    assert len(said) == len({line.split(": ")[2] for line in said})
    assert any("training loss: train/nll is" in line and "lower model.optimizer.lr" in line for line in said)
    state = last_checkpoint(runs / "avatars/autoencoder")["callbacks"]["Health"]
    assert state["episodes"]["training loss"]["on"]
    train(runs, *HOT, "max_images=64")
    assert not {line.split(": ")[2] for line in warnings(capsys)} & {line.split(": ")[2] for line in said}


def test_the_doctor_says_the_same(runs, capsys):
    with pytest.raises(SystemExit) as end:
        doctor([str(runs / "avatars")])
    assert end.value.code == 1
    bad = [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("  BAD")]
    assert "training" in bad


def test_the_first_images_are_shown(runs):
    (path,) = (runs / "avatars/autoencoder/samples").glob("data_*.png")
    assert path.name == "data_000000000.png"
    assert Image.open(path).size == (3 * 34 + 2, 3 * 34 + 2)  # a batch of eight, 32 pixels each


def validation(health, images_seen, rank=0, **metrics):
    trainer = SimpleNamespace(callback_metrics=metrics, is_global_zero=rank == 0, sanity_checking=False)
    health.on_validation_end(trainer, SimpleNamespace(stage="diffusion", images_seen=images_seen))


def steady(value):
    return {"val/loss_on_training_images": torch.tensor(1.0), "val/loss": torch.tensor(value)}


@pytest.fixture
def health(tmp_path):
    return Health(str(write_stage(tmp_path / "a/diffusion", max_images=10)))


def said(capsys):
    return capsys.readouterr().out.count("learning by heart")


def test_it_waits_speaks_once_and_again_after_a_recovery(health, capsys):
    for images, value, expected in ((1, 1.7, 0), (2, 1.7, 0), (3, 1.7, 1), (4, 1.7, 0), (5, 1.2, 0), (6, 1.0, 0)):
        validation(health, images, **steady(value))
        assert said(capsys) == expected
    for images in (7, 8, 9):
        validation(health, images, **steady(1.7))
    assert said(capsys) == 1


def test_a_resumed_run_remembers(health, capsys, tmp_path):
    for images in (1, 2, 3):
        validation(health, images, **steady(1.7))
    assert said(capsys) == 1
    again = Health(str(tmp_path / "a/diffusion"))
    validation(again, 3, **steady(1.7))  # a resumed run makes up for a validation before its state is there
    again.load_state_dict(health.state_dict())
    assert again.curves == health.curves
    validation(again, 4, **steady(1.7))
    assert said(capsys) == 0


def test_other_ranks_are_silent_and_what_others_say_is_left_to_them(health, capsys):
    for images in (1, 2, 3):
        validation(health, images, rank=1, **steady(1.7))
    assert said(capsys) == 0
    assert "codebook" in Health.ELSEWHERE
    assert "discriminator" in Health.ELSEWHERE


def test_what_it_keeps_is_bounded(health):
    for images in range(Health.KEPT + 3):
        validation(health, images, **steady(math.nan))
    assert {len(curve) for curve in health.curves.values()} == {Health.KEPT}


def test_cached_latents_are_decoded():
    first_stage = SimpleNamespace(from_moments=lambda m: 2 * m, decode=lambda z: SimpleNamespace(sample=z + 1))
    module = SimpleNamespace(autoencoder=first_stage)
    assert as_images(module, {"moments": torch.ones(1, 3, 2, 2, dtype=torch.float16)}).unique() == 3
    assert as_images(module, {"image": torch.zeros(1, 3, 2, 2)}).unique() == 0

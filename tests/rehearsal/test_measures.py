"""What is measured there: features of images, a first stage, and what ranks exchange."""

import pytest
import torch
from lightning.pytorch.trainer.connectors.accelerator_connector import _AcceleratorConnector

from ldm_lab.metrics import own
from ldm_lab.metrics.images import DataPixels
from ldm_lab.tools.evaluate.autoencoder import reconstructions
from ldm_lab.tools.evaluate.rows import rows
from ldm_lab.training.trainer import Trainer
from tests.rehearsal.accelerator import OVERRIDES, RehearsalStrategy
from tests.trained import train
from tests.training.stages import tiny


def trainer(**settings):
    return Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, **settings)


@pytest.mark.slow
def test_an_evaluation_finds_what_it_finds_on_the_cpu(rehearsal, tmp_path, monkeypatch):
    monkeypatch.setattr(own, "STEPS", 3)
    module, data, _ = tiny("lsun_churches/diffusion")
    data.prepare_data()
    images = DataPixels(data.train_set, "images", 40)
    there = trainer(accelerator="rehearsal", strategy=RehearsalStrategy())
    extractor = own.own(images, tmp_path, rehearsal.device)
    found, scores = [], []
    for each in (trainer(accelerator="cpu"), there):
        found.append(rows(each, extractor, images, extractor, extractor.dimension))
        scores.append(reconstructions(module.autoencoder, extractor, None, images, each, draws=2)[0])
    assert torch.allclose(*found, atol=1e-4)
    for name, one in scores[0].items():
        assert scores[1][name].value == pytest.approx(one.value, rel=1e-3, abs=1e-3), name


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["autoencoder", "diffusion"])
def test_what_several_ranks_reduce_lies_on_the_device(stage, rehearsal, tiny_runs, tmp_path, monkeypatch):
    """NCCL takes nothing else. One process stands for them: Lightning is told that they are several."""
    monkeypatch.setattr(_AcceleratorConnector, "is_distributed", True)
    monkeypatch.setattr(own, "STEPS", 3)
    more = [] if stage == "autoencoder" else [f"autoencoder={tiny_runs}/celebahq/autoencoder/final"]
    if stage == "diffusion":
        more += ["callbacks.evaluate.every_images=8", "callbacks.evaluate.num_samples=8"]
    train(tmp_path, f"experiment=celebahq/{stage}", *OVERRIDES, *more, "max_images=8")

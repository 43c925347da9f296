"""What a run tells of itself: its size, its images, and what was made of what."""

import re

import pytest
import torch

from ldm_lab.config import stages
from ldm_lab.config.compose import Recipe
from ldm_lab.data.drawn import DrawnImages
from ldm_lab.training import facts as telling
from ldm_lab.training.facts import facts, flops_per_image
from tests.training.stages import tiny


@pytest.mark.parametrize(("stage", "expected"), [("diffusion", 202e9), ("autoencoder", 1016e9)])
def test_the_published_networks_cost_what_is_known_of_them(stage, expected):
    """In the library's operations; 192 GFLOP and 947 where a CPU upsamples with fewer multiplications."""
    config = Recipe.parse(["experiment=celebahq", "data.root=."]).compose()
    first, second = config
    with torch.device("meta"):
        autoencoder = stages.networks(first, None)["autoencoder"]
        network = autoencoder if stage == "autoencoder" else stages.networks(second, autoencoder)["unet"]
    assert flops_per_image(network, autoencoder, (256, 256)) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("experiment", ["celebahq/diffusion", "lsun_churches/autoencoder"])
def test_facts_are_of_the_network_that_is_trained(experiment):
    module, data, _ = tiny(experiment)
    found = facts(module, data)
    network = module.unet if experiment.endswith("diffusion") else module.autoencoder
    assert found["parameters"] == sum(parameter.numel() for parameter in network.parameters())
    assert found["flops_per_image"] > 1e5
    assert found["data"].keys() == {"train", "val"}
    assert all(re.fullmatch("[0-9a-f]{16}", mark) for mark in found["data"].values())
    assert found["git_commit"] is None or re.fullmatch("[0-9a-f]{40}", found["git_commit"])
    other = tiny(experiment)[1]
    other.train_set = DrawnImages("train", 32, drawing_seed=1)
    marks = facts(module, other)["data"]
    assert marks["train"] != found["data"]["train"]
    assert marks["val"] == found["data"]["val"]


def test_other_images_and_no_repository_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(telling, "ROOT", tmp_path)
    assert telling.git_commit() is None
    (tmp_path / ".git").mkdir()  # no repository either
    assert telling.git_commit() is None


def test_a_network_that_cannot_be_counted_stops_nothing(monkeypatch):
    def fail(*_):
        raise NotImplementedError("asks for a value")

    monkeypatch.setattr(telling, "flops_per_image", fail)
    assert "flops_per_image" not in facts(*tiny("celebahq/diffusion")[:2])

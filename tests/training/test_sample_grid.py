"""The preview: which sampler draws it, and that training does not notice."""

from types import SimpleNamespace

import pytest
import torch

from ldm_lab.config.compose import ConfigError, Recipe, build_all
from ldm_lab.diffusion.flow import is_flow
from ldm_lab.diffusion.samplers import SAMPLERS
from ldm_lab.pipeline import LDMPipeline
from ldm_lab.training.callbacks import sample_grid
from ldm_lab.training.callbacks.pictures import shared
from ldm_lab.training.callbacks.sample_grid import SampleGrid
from tests.helpers import GOLDEN


@pytest.mark.parametrize("name", [name for name, kind in SAMPLERS.items() if not is_flow(kind)])
def test_the_sampler_that_was_asked_for_draws(name, tmp_path, monkeypatch):
    model, pipes, shown = LDMPipeline.from_pretrained(GOLDEN / "diffusers" / "ldm_tiny"), [], []
    own = model.scheduler

    def pipeline():
        pipes.append(LDMPipeline(**model.components))
        return pipes[-1]

    monkeypatch.setattr(sample_grid, "show", lambda trainer, module, folder, name, images: shown.append(images))
    module = SimpleNamespace(device=torch.device("cpu"), pipeline=pipeline)
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    trainer = SimpleNamespace(global_rank=0, world_size=1, precision="32-true", strategy=strategy)
    SampleGrid(tmp_path, 8, images=2, steps=3, sampler=name).sample(trainer, module)
    assert type(pipes[0].scheduler) is SAMPLERS[name]
    assert pipes[0].scheduler.num_inference_steps == 3
    assert (model.scheduler, own.num_inference_steps) == (own, None)
    assert shown[0].shape[0] == 2


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_ranks_draw_shares_of_the_same_images(ranks, monkeypatch):
    """Of seven images, which are their own numbers."""
    shares = []

    def make(indices):
        shares.append(torch.tensor(indices, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 3, 2, 2))
        return shares[-1]

    def all_gather(parts, mine):
        for part, share in zip(parts, shares, strict=False):
            part.copy_(share)

    monkeypatch.setattr(torch.distributed, "all_gather", all_gather)
    for rank in range(ranks):
        found = shared(SimpleNamespace(global_rank=rank, world_size=ranks), 7, make)
    assert len({len(share) for share in shares}) == 1  # as a gathering needs it
    assert found[:, 0, 0, 0].tolist() == list(range(7))  # on the last rank, when all have drawn


def test_a_sampler_that_there_is_not_is_refused_when_the_callback_is_built(tmp_path):
    with pytest.raises(ValueError, match=r"^sampler=euler: there are ddim, ddpm, dpm_solver, flow_euler, flow_heun$"):
        SampleGrid(tmp_path, 8, sampler="euler")
    recipe = Recipe.parse(["experiment=avatars/diffusion", "callbacks.sample_grid.sampler=euler"])
    with pytest.raises(ConfigError, match=r"^callbacks\.sample_grid: sampler=euler: there are "):
        build_all(recipe.compose()[0].callbacks, "callbacks")

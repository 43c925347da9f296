"""`model.scaling_factor=measure`: what is stored belongs to the weights of the first stage, not to what it carried."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch

from ldm_lab.training.statistics import moments, pooled
from tests.trained import metrics, train
from tests.training.stages import tiny

CARRIED = (1.0, 0.18215)


def measured(experiment, carried, device="cpu"):
    """What stage 2 finds at its start with a first stage that carries a scale, and the latents' own deviation."""
    module, data, _ = tiny(f"{experiment}/diffusion", "model.scaling_factor=measure")
    data.prepare_data()
    data.setup()
    module.autoencoder.register_to_config(scaling_factor=carried)
    module.to(device)
    module._trainer = SimpleNamespace(
        datamodule=data, world_size=1, global_rank=0, strategy=SimpleNamespace(all_gather=lambda rows: rows)
    )
    module.on_fit_start()
    with torch.no_grad():
        images = torch.cat([batch["image"] for batch in data.training_sample(module.MEASURED_IMAGES)])
        modes = module.autoencoder.cpu().latents(images)
    return module.autoencoder.config.scaling_factor, modes.double().std().item()


@pytest.mark.parametrize("experiment", ["celebahq", "lsun_churches"])
def test_it_does_not_depend_on_what_the_first_stage_carries(experiment):
    (one, std), (other, _) = (measured(experiment, carried) for carried in CARRIED)
    assert other == one
    if experiment == "celebahq":  # latents that are not drawn
        assert one == pytest.approx(1 / std, rel=1e-4)


def test_it_is_measured_on_any_device(rehearsal):
    assert measured("lsun_churches", 1.0, rehearsal.device)[0] == pytest.approx(measured("lsun_churches", 1.0)[0], 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("source", ["celebahq", "lsun_churches"])
def test_latents_then_have_unit_scale(source, tiny_runs, tmp_path):
    """`autoencoder=FOLDER`, whose config has Stable Diffusion's scale."""
    folder = shutil.copytree(tiny_runs / source / "autoencoder/final", tmp_path / "vae")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "scaling_factor": 0.18215}))
    overrides = [f"autoencoder={folder}", "model.scaling_factor=measure", "max_images=8"]
    experiment = {"celebahq": "avatars"}.get(source, source)  # with as many channels, and a scale that is measured
    train(tmp_path, f"experiment={experiment}/diffusion", *overrides)
    found = metrics(tmp_path / f"{experiment}/diffusion")[8]["val/latent_std"]
    assert found == pytest.approx(1, abs=0.2)


def test_moments_of_batches_are_those_of_all():
    """Far from zero too, where a difference of squares in float32 would leave nothing."""
    values = 300 + torch.randn(7, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 10
    rows = torch.stack([moments(part.float()) for part in values.split([4, 2, 1])]).double()
    mean, std = pooled(rows)
    assert (mean, std) == (
        pytest.approx(values.mean().item(), rel=1e-7), pytest.approx(values.std(correction=0).item(), rel=1e-4)
    )  # fmt: skip

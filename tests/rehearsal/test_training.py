"""Whole trainings there: both stages, tiny, with all callbacks. Mixed devices and float64 raise of themselves."""

import json
from pathlib import Path

import pytest
import torch

from ldm_lab.metrics import own
from ldm_lab.training.callbacks.progress import Progress
from tests.rehearsal import documented, mps, rules
from tests.rehearsal.accelerator import OVERRIDES
from tests.rehearsal.callbacks import Steps
from tests.trained import final_weights, metrics, train

# Rows of metrics in the second and the fourth step; checkpoints, validation and pictures after these.
COMMON = (
    *OVERRIDES, "max_images=32", "validate_every=16", "checkpoint_every=16", "trainer.log_every_n_steps=2",
    "+callbacks.steps._target_=tests.rehearsal.callbacks.Steps",
)  # fmt: skip
PLAIN = 16  # images at which a step begins that nothing else belongs to
NEWER = ("model.quantizer=simvq", "model.gradient=rotation", "model.equivariance.probability=0.6")
RUNS = {
    "celebahq": (  # VQ; the discriminator begins on the way, two micro-batches, the codebook is drawn
        *NEWER, "trainer.gradient_clip_val=1", "data.batch_size=4", "model.loss.adversarial.start_images=16",
    ),
    "lsun_churches": (  # KL, measured scale; a step is left out
        "trainer.on_nan=skip", "trainer.gradient_clip_val=1", "model.loss.discriminator.channels=8",
        "model.loss.adversarial.start_images=8",
        "+callbacks.spoil._target_=tests.rehearsal.callbacks.SpoilGradient", "+callbacks.spoil.images=8",
    ),
    "avatars": ("snapshots=16", "callbacks.evaluate.every_images=16", "callbacks.evaluate.num_samples=8"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(own, "STEPS", 3)
    monkeypatch.setattr(Progress, "SHOW_LOSS_EVERY", 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("experiment", RUNS)
def test_both_stages_train(experiment, rehearsal, tmp_path):
    """Only what the documentation names waits in a step, and Apple's device has a kernel for all that is done."""
    loss = train(tmp_path, f"experiment={experiment}", *COMMON, *RUNS[experiment])
    assert loss == loss
    assert documented.undocumented(rehearsal.log.waits) == set()
    assert mps.without(rehearsal.log.operations) == set()
    for stage in ("autoencoder", "diffusion"):
        assert json.loads((tmp_path / experiment / stage / "status.json").read_text())["finished"]
        for weights in final_weights(tmp_path / experiment / stage).values():
            assert all(value.isfinite().all() for value in weights.values())
    if experiment == "lsun_churches":
        assert metrics(tmp_path / experiment / "diffusion")[32]["train/skipped_steps"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("experiment", ["celebahq/autoencoder", "lsun_churches/autoencoder"])
def test_a_step_that_nothing_else_belongs_to_waits_for_nothing(experiment, rehearsal, tmp_path, monkeypatch):
    monkeypatch.setattr(Progress, "SHOW_LOSS_EVERY", 1e9)
    overrides = [*COMMON, "trainer.gradient_clip_val=1", "data.batch_size=4", "model.loss.adversarial.start_images=0"]
    train(tmp_path, f"experiment={experiment}", *overrides)
    waits = Steps.waits[PLAIN]
    assert {str(wait) for wait in waits if documented.READ_LATER not in wait.places} == set()


@pytest.mark.slow
def test_stage_2_of_another_first_stage_goes_on_and_starts_from_weights(rehearsal, tiny_runs, tmp_path):
    """`autoencoder=`, resuming, `init=`."""
    common = ["experiment=avatars/diffusion", f"autoencoder={tiny_runs}/celebahq/autoencoder/final", *OVERRIDES]
    train(tmp_path, *common, "name=one", "max_images=8")
    train(tmp_path, *common, "name=one", "max_images=16")
    assert set(metrics(tmp_path / "one/diffusion")) == {8, 16}
    train(tmp_path, *common, "name=two", "max_images=8", f"init={tmp_path}/one")
    assert documented.undocumented(rehearsal.log.waits) == set()


def test_every_place_of_the_table_is_there():
    """A function that is gone leaves the table."""
    assert len(documented.places()) > 5
    for place in documented.places():
        file, _, function = place.partition(": ")
        library = "lightning/" if file.startswith("lightning/") else ""
        path = Path(rules.NAMES[library].__file__).parent / file.removeprefix(library)
        assert f"def {function}(" in path.read_text(encoding="utf-8"), place


def test_where_no_fused_kernels_are_the_optimizer_is_the_plain_one(rehearsal, monkeypatch):
    """On other devices `fused` holds, also after a checkpoint has brought something else."""
    from ldm_lab.training import stage_module
    from tests.training.stages import tiny

    module, _, _ = tiny("celebahq/diffusion")
    assert module.new_optimizer().param_groups[0]["fused"] is True
    there = module.to(rehearsal.device)
    monkeypatch.setattr(stage_module, "_get_fused_kernels_supported_devices", lambda: ["cpu", "cuda"])
    optimizer = there.new_optimizer()
    assert optimizer.param_groups[0]["fused"] is False
    for parameter in there.unet.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()

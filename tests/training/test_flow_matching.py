"""`process=flow` from the command line: one override, a training that resumes, samples, and what does not fit."""

import json
import signal

import pytest
import torch

import sample
from ldm_lab import LDMPipeline, VQModel
from ldm_lab.config.compose import Recipe, plain
from ldm_lab.diffusion.flow_heun import FlowMatchHeunDiscreteScheduler
from ldm_lab.runs.diagnosis.diffusion import loss_of_zero
from ldm_lab.training import initial
from tests.sampling.test_sample_command import command
from tests.trained import train
from tests.training.test_resume import assert_same_training, interrupt

AUTOENCODER = {
    "block_out_channels": [8, 16, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "norm_num_groups": 8,
    "num_vq_embeddings": 32,
}


def overrides(folder):
    return ["experiment=avatars/diffusion", f"autoencoder={folder}/first", "process=flow", "max_images=32"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with a first stage and a finished tiny run of flow matching on it."""
    folder = tmp_path_factory.mktemp("flow")
    torch.manual_seed(0)
    VQModel(**AUTOENCODER).save_pretrained(folder / "first")
    train(folder, *overrides(folder))
    return folder


def test_an_interrupted_training_ends_as_an_undisturbed_one(runs, tmp_path):
    stop = interrupt("diffusion", 8, where="train", number=int(signal.SIGTERM))
    with pytest.raises(SystemExit):
        train(tmp_path, *overrides(runs), *stop)
    train(tmp_path, *overrides(runs), "data.batch_size=8")
    assert_same_training(tmp_path / "avatars/diffusion", runs / "avatars/diffusion")


def test_what_it_leaves_is_a_model_of_flow_matching(runs, tmp_path):
    pipe = LDMPipeline.from_pretrained(runs / "avatars")
    assert pipe.scheduler.config.shift == pytest.approx((3 * 8 * 8 / 4096) ** 0.5)  # of the latents
    assert json.loads((runs / "avatars/model_index.json").read_text())["scheduler"][0] == "ldm_lab"
    checkpoint = LDMPipeline.from_pretrained(runs / "avatars/diffusion/checkpoints/last.ckpt")
    assert checkpoint.scheduler.config == pipe.scheduler.config
    ckpt = {"ckpt": runs / "avatars", "num_samples": 2, "sampler.steps": 3}
    sample.job(command(tmp_path / "heun", **ckpt, sampler="flow_heun", denoising=1))
    assert json.loads((tmp_path / "heun/manifest.json").read_text())["sampler"] == "flow_heun"
    assert len(list((tmp_path / "heun/images").iterdir())) == 2
    with pytest.raises(ValueError, match=r"^sampler=ddim: .* flow matching; use sampler=flow_euler or flow_heun$"):
        sample.job(command(tmp_path / "ddim", **ckpt))
    with pytest.raises(ValueError, match=r"^sampler\.eta=1\.0: flow_euler has none; use sampler\.eta=0$"):
        sample.job(command(tmp_path / "eta", **ckpt, sampler="flow_euler", **{"sampler.eta": 1.0}))
    assert not [folder for folder in ("ddim", "eta") if (tmp_path / folder).exists()]


def composed(*more):
    (config,) = Recipe.parse(["experiment=avatars/diffusion", "debug=tiny", *more]).compose()
    return plain(config)


def test_a_unet_goes_on_with_its_own_process(runs):
    source = f"init={runs}/avatars"
    assert "model.scheduler.num_train_timesteps" not in initial.settings(composed(source, "process=flow"), ())
    with pytest.raises(ValueError, match=r"was trained with FlowMatchEulerDiscreteScheduler: add process=flow, or"):
        initial.settings(composed(source), ())
    other = LDMPipeline.from_pretrained(runs / "avatars")
    other.scheduler = FlowMatchHeunDiscreteScheduler()
    other.save_pretrained(runs / "heun")
    initial.settings(composed(f"init={runs}/heun", "process=flow"), ())


def test_one_override_replaces_all_of_a_diffusion():
    first, second = map(plain, Recipe.parse(["experiment=celebahq", "data.root=/x", "process=flow"]).compose())
    assert "scheduler" not in first["model"]
    assert "sample_grid" not in first["callbacks"]
    assert set(second["model"]["scheduler"]) == {"_target_", "num_train_timesteps", "shift"}
    assert second["model"]["objective"]["weighting"]["_target_"].endswith("PlainWeighting")
    assert [second["callbacks"][name]["sampler"] for name in ("sample_grid", "denoising_strip", "evaluate")] == [
        "flow_euler"
    ] * 3
    none = Recipe.parse(["experiment=celebahq/diffusion", "data.root=/x", "process=flow", "callbacks=none"]).compose()
    assert plain(none[0])["callbacks"] == {}
    typed = composed("process=flow", "model.scheduler.shift=3", "model.objective.timesteps.mean=-0.5")
    assert typed["model"]["scheduler"]["shift"] == 3
    assert typed["model"]["objective"]["timesteps"]["mean"] == -0.5
    assert loss_of_zero(typed, std=0.5) == pytest.approx(1.25)  # of epsilon - x0


def test_the_samplers_of_callbacks_must_fit_before_anything_is_trained(runs, tmp_path):
    for more, message in (
        ([*overrides(runs), "callbacks.evaluate.sampler=ddim"], r"^callbacks\.evaluate\.sampler=ddim: .* flow_heun$"),
        (
            ["experiment=avatars/diffusion", f"autoencoder={runs}/first", "callbacks.sample_grid.sampler=flow_euler"],
            r"^callbacks\.sample_grid\.sampler=flow_euler: the model was trained as a diffusion.* or dpm_solver$",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            train(tmp_path, *more)
    with pytest.raises(ValueError, match=r"^model\.scheduler\.shift=image: must be a number above 0 or latents$"):
        train(tmp_path, *overrides(runs), "model.scheduler.shift=image")
    assert not list(tmp_path.rglob("*.ckpt"))

"""Both stages from the command line on, in their tiny form: what is written, skipped, continued and refused."""

import json
import shlex

import pytest
import torch

import sample
from ldm_lab.config import stages
from ldm_lab.config.compose import Recipe
from ldm_lab.data.drawn import DrawnImages
from ldm_lab.models.vq_model import VQModel
from ldm_lab.pipeline import LDMPipeline
from ldm_lab.utils.errors import UserError
from ldm_lab.utils.reading import LoadError
from tests.helpers import assert_close_relative
from tests.trained import (
    EXPERIMENTS,
    WEIGHTS,
    assert_equal,
    final_weights,
    last_checkpoint,
    metrics,
    snapshot,
    train,
    undisturbed,
)

STAGES = ("autoencoder", "diffusion")
CELEBAHQ = "experiment=celebahq"
STAGE_1, STAGE_2 = "experiment=celebahq/autoencoder", "experiment=celebahq/diffusion"


@pytest.mark.parametrize("experiment", EXPERIMENTS)
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_leaves_what_is_promised(tiny_runs, experiment, stage):
    folder = tiny_runs / experiment / stage
    assert all(
        (folder / name).is_file() for name in ("config.yaml", "checkpoints/last.ckpt", "metrics.csv", "status.json")
    )
    assert all((folder / name).is_dir() for name in ("samples", "final"))
    names = {
        "autoencoder": {"reconstructions"} | ({"codebook"} if experiment != "lsun_churches" else set()),
        "diffusion": {"samples", "samples_raw", "denoising", "neighbours"},
    }
    pictures = {p.name for p in (folder / "samples").iterdir()}
    assert pictures == {f"{name}_{n:09d}.png" for name in names[stage] for n in (32, 64)} | {"data_000000000.png"}
    status = json.loads((folder / "status.json").read_text())
    assert status["finished"] is True
    assert status["max_images"] == 64
    assert status["val/loss"] == pytest.approx(metrics(folder)[64]["val/loss"], rel=1e-5)
    assert sorted(metrics(folder)) == [8, 16, 24, 32, 40, 48, 56, 64]
    assert len((folder / "saves.txt").read_text().split()) >= 4
    assert [path for path in folder.rglob("*") if path.name.startswith(".")] == [], "a temporary file stayed"


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_the_run_is_a_pipeline_folder(tiny_runs, experiment):
    run = tiny_runs / experiment
    names = ["README.md", *STAGES, "model_index.json", "samples.png", "scheduler", "unet", "vqvae"]
    assert sorted(p.name for p in run.iterdir() if p.name not in ("samples", "eval")) == names
    exported = final_weights(run / "diffusion")
    (unet,) = (weights for file, weights in exported.items() if file.startswith("unet/"))
    assert_equal(dict(LDMPipeline.from_pretrained(run).unet.state_dict()), unet)
    # Stage 2 holds the autoencoder that stage 1 of this very run has made.
    assert_equal(exported[f"vqvae/{WEIGHTS}"], final_weights(run / "autoencoder")[WEIGHTS])
    # What is exported of the UNet is its moving average.
    state = last_checkpoint(run / "diffusion")["state_dict"]
    for key, value in unet.items():
        assert torch.equal(value, state[f"ema.model.{key}"]), key
    assert any(not torch.equal(value, state[f"unet.{key}"]) for key, value in unet.items())


def test_every_checkpoint_is_plain_data(tiny_runs):
    paths = sorted(tiny_runs.rglob("*.ckpt"))
    assert len(paths) == 2 * len(STAGES) * len(EXPERIMENTS)
    for path in paths:
        images_seen = torch.load(path, weights_only=True, mmap=True)["ldm_lab"]["images_seen"]
        assert images_seen == {"last": 64, "previous": 48}[path.stem]


def test_the_scale_is_that_of_the_latents(tiny_runs):
    """The demo measures it; a first stage on its own carries 1."""
    first = VQModel.from_pretrained(tiny_runs / "avatars/autoencoder/final")
    assert first.config.scaling_factor == 1.0
    images = torch.stack([image["image"] for image in DrawnImages("train", 32)])
    with torch.no_grad():
        expected = 1 / first.encode(images).latents.std(correction=0).item()
    assert VQModel.from_pretrained(tiny_runs / "avatars/vqvae").config.scaling_factor == pytest.approx(
        expected, rel=1e-5
    )
    assert VQModel.from_pretrained(tiny_runs / "celebahq/vqvae").config.scaling_factor == 1.0  # as published


def test_diffusers_loads_the_run_and_draws_the_same(tiny_runs):
    diffusers = pytest.importorskip("diffusers")
    run = tiny_runs / "avatars"
    theirs, ours = diffusers.LDMPipeline.from_pretrained(run), LDMPipeline.from_pretrained(run)
    for pipe in (theirs, ours):
        pipe.set_progress_bar_config(disable=True)
    drawn = [
        pipe(2, generator=torch.Generator().manual_seed(5), eta=0.0, num_inference_steps=5, output_type="np").images
        for pipe in (theirs, ours)
    ]
    assert_close_relative(drawn[1], drawn[0])


def test_a_second_run_trains_nothing_and_touches_nothing(tiny_runs, capsys):
    before = snapshot(tiny_runs)
    loss = train(tiny_runs, CELEBAHQ)
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "is finished at 64 images: nothing to do" in line] == [
        f"{tiny_runs}/celebahq/{stage} is finished at 64 images: nothing to do" for stage in STAGES
    ]
    assert lines[-1] == f"Done. Next: python sample.py ckpt={tiny_runs}/celebahq"
    assert loss == pytest.approx(metrics(tiny_runs / "celebahq/diffusion")[64]["val/loss"], rel=1e-5)
    assert snapshot(tiny_runs) == before


def test_a_run_with_snapshots_is_sampled_with_the_first_as_its_guide(tiny_runs, tmp_path, capsys):
    """The line that a training ends with is one that runs."""
    train(tmp_path, f"{CELEBAHQ}/diffusion", f"autoencoder={tiny_runs}/celebahq", "snapshots=25%", "max_images=32")
    run, line = tmp_path / "celebahq", capsys.readouterr().out.splitlines()[-1]
    assert line == f"Done. Next: python sample.py ckpt={run} guide={run}@8 guidance=1.5"
    with undisturbed():
        sample.job([*shlex.split(line)[4:], "num_samples=2", "sampler.steps=2", "trainer=cpu"])
    (manifest,) = run.glob("samples/*/manifest.json")
    assert json.loads(manifest.read_text())["guidance"] == 1.5


@pytest.mark.parametrize("recipe", ["avatars", "folder"])
def test_small_models_keep_a_guide(recipe):
    config = Recipe.parse([f"experiment={recipe}/diffusion", "data.root=x"][: 1 + (recipe == "folder")]).compose()[0]
    assert config.snapshots == config.max_images / 4


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            [CELEBAHQ, "seed=1"],
            r"celebahq/autoencoder was started with 4 other settings, listed below[^\n]*\nseed: 0 -> 1",
        ),
        ([CELEBAHQ, "model.loss.codebook_weight=2.0"], "model.loss.codebook_weight: 1.0 -> 2.0"),
        # a key of stage 2 alone is found before anything is done in stage 1
        (
            [CELEBAHQ, "model.ema.decay=0.9"],
            "celebahq/diffusion .* model.ema.decay: 0.9999 -> 0.9. Choose another name=",
        ),
        ([CELEBAHQ, "trainer.gradient_clip_val=1.0"], "trainer.gradient_clip_val: None -> 1.0"),
        ([STAGE_1, "max_images=32"], "max_images=32, but .*/autoencoder is made for 64"),
        ([CELEBAHQ, "resume=never"], "resume=never, but .*/celebahq/autoencoder is not empty: choose another name="),
        ([CELEBAHQ, "resume=perhaps"], "resume=perhaps: must be auto, never or force"),
        ([STAGE_2, "name=avatars"], "avatars/diffusion was started with 11 other settings, listed below"),
    ],
)
def test_a_run_of_other_settings_is_left_alone(tiny_runs, overrides, message):
    before = snapshot(tiny_runs)
    with pytest.raises(ValueError, match=message) as error:
        train(tiny_runs, *overrides)
    assert "\n" not in str(error.value)
    assert snapshot(tiny_runs) == before


def test_force_takes_other_settings_and_harmless_ones_need_none(tiny_runs, capsys):
    before = snapshot(tiny_runs)
    train(tiny_runs, CELEBAHQ, "seed=1", "resume=force")
    train(tiny_runs, CELEBAHQ, "data.num_workers=1", "data.batch_size=4", "validate_every=8", "callbacks=none")
    assert capsys.readouterr().out.count("nothing to do") == 4
    assert snapshot(tiny_runs) == before


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["model.unet.in_channels=4", "model.unet.out_channels=4"],
            "unet.in_channels=4 .* the autoencoder have 3 channels",
        ),
        (["data.image_size=30"], "data.image_size=30 does not fit the networks: .* multiples of 4, got 30x30"),
        (["data.image_size=36"], "data.image_size=36 does not fit the networks: .* multiples of 2, got 9x9"),
        (["model.scheduler.rescale_betas_zero_snr=true"], "'epsilon' cannot be trained with zero terminal SNR"),
        (["model.unet.norm_num_groups=7"], "model.unet: norm_num_groups=7 does not divide 16"),
        (["trainer.accelerator=quantum"], r"^trainer\.accelerator=quantum: there is no such kind of device; use"),
        (["trainer.accelerator=tpu"], r"^trainer\.accelerator=tpu: no such device here; use trainer\.accelerator=cpu$"),
        (["trainer.devices=0"], r"^trainer\.devices=0: use trainer\.devices=1"),
        (["trainer.strategy=nonsense"], r"^trainer\.strategy=nonsense: .* use trainer\.strategy=auto or ddp"),
        (["trainer.num_nodes=0"], r"^trainer\.num_nodes=0: must be a whole number, at least 1"),
        (["trainer.precision=bf15"], r"^trainer\.precision=bf15: give auto, 32-true, bf16-mixed or 16-mixed$"),
        (
            ["trainer.precision=bf16-true"],
            r"^trainer\.precision=bf16-true: training keeps its weights in float32: give",
        ),
        (["trainer.precision=64-true"], r"^trainer\.precision=64-true: give auto, 32-true, bf16-mixed or 16-mixed$"),
        (
            ["trainer.precision=16-mixed"],
            r"^trainer\.precision=16-mixed: needs a GPU; use trainer\.precision=bf16-mixed",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_stage_1(tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        train(tmp_path, CELEBAHQ, *overrides)
    assert list(tmp_path.iterdir()) == []


def test_without_validation_both_stages_finish(tmp_path, monkeypatch):
    """There is no metric then, which only a search needs."""
    without = ["callbacks=none", "logger=none", "max_images=8", "checkpoint_every=8", "+trainer.limit_val_batches=0"]
    assert train(tmp_path, CELEBAHQ, *without) is None
    for stage in STAGES:
        assert json.loads((tmp_path / "celebahq" / stage / "status.json").read_text())["finished"] is True
    monkeypatch.setattr(stages, "is_searched", lambda: True)
    with pytest.raises(
        UserError, match=r"^optimized_metric=val/loss: the last stage has no metrics: nothing was valid"
    ):
        stages.optimized({"max_images": 8}, "val/loss")
    with pytest.raises(UserError, match=r"^optimized_metric=val/fid: the last stage has val/loss$"):
        stages.optimized({"val/loss": 1.0}, "val/fid")


def test_a_missing_autoencoder_is_named_with_the_command_that_makes_it(tmp_path):
    command = f"python train.py experiment=celebahq/autoencoder debug=tiny paths.runs={tmp_path} name=mine"
    for override, found in (
        ([], f"{tmp_path}/mine/autoencoder/final"),
        (["autoencoder=null"], None),
        (["autoencoder=x"], "x"),
    ):
        with pytest.raises(LoadError) as error:
            train(tmp_path, STAGE_2, "name=mine", *override)
        assert str(error.value) == f"autoencoder={found} is not there; make it with: {command}"
    assert list(tmp_path.iterdir()) == []


def test_an_autoencoder_of_other_channels_is_refused(tmp_path):
    widths = {"block_out_channels": [8, 8], "norm_num_groups": 8, "num_vq_embeddings": 8}
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    VQModel(latent_channels=4, vq_embed_dim=4, **widths, **blocks).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"unet.in_channels=3 .* of the autoencoder have 4 channels"):
        train(tmp_path / "runs", STAGE_2, f"autoencoder={tmp_path}/other")
    assert not (tmp_path / "runs").exists()

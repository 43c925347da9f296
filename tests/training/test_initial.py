"""`init=`: where weights come from, what comes along with them, what is refused."""

import copy

import pytest
import torch
import yaml
from torch import nn

from ldm_lab import LDMPipeline, VQModel
from ldm_lab.checkpoints import checkpoint
from ldm_lab.models.autoencoders import load_autoencoder
from ldm_lab.models.codebook import CodebookUsage
from ldm_lab.training import initial
from ldm_lab.training.autoencoder_module import AutoencoderModule
from ldm_lab.training.diffusion_module import DiffusionModule
from ldm_lab.training.ema import EMA
from ldm_lab.utils.reading import LoadError
from tests.checkpoints.test_checkpoint import state_of
from tests.helpers import GOLDEN
from tests.models.weights import assert_equal_weights
from tests.trained import metrics, train

MODEL = GOLDEN / "diffusers" / "ldm_tiny"
TRAINING = {"optimizer": None, "schedule": None}
STAGES = ("autoencoder", "diffusion")
WIDTHS = {
    "block_out_channels": [16, 32],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "num_vq_embeddings": 64,
    "norm_num_groups": 8,
}


@pytest.fixture
def pipe():
    pipe = LDMPipeline.from_pretrained(MODEL)
    pipe.vqvae.register_to_config(scaling_factor=0.75)
    return pipe


def stage_1(vqvae):
    usage = CodebookUsage(vqvae.config.num_vq_embeddings)
    return AutoencoderModule(vqvae, loss=nn.Linear(1, 1), codebook=usage, **TRAINING)


def stage_2(pipe, **more):
    parts = copy.deepcopy(pipe.components)
    return DiffusionModule(
        parts["unet"], parts["vqvae"], parts["scheduler"], objective=None, ema=EMA, **more, **TRAINING
    )


def trained(module):
    """A module whose weights, raw and averaged, are its own."""
    with torch.no_grad():
        for place, parameter in enumerate(module.parameters()):
            parameter.add_(0.01 * (place % 7))
    return module


@pytest.fixture
def run(tmp_path, pipe):
    """An unfinished run: both stages have a checkpoint, stage 1 its result, stage 2 a snapshot."""
    run = tmp_path / "run"
    first = stage_1(copy.deepcopy(pipe.vqvae))
    first.autoencoder.save_pretrained(run / "autoencoder/final")
    checkpoint.save(state_of(first), run / "autoencoder/checkpoints/last.ckpt")
    second = trained(stage_2(pipe, scaling_factor=0.75))
    second.images_seen = 16
    checkpoint.save(state_of(second), run / "diffusion/checkpoints/last.ckpt")
    pipe.save_pretrained(run / "diffusion/snapshots/000000008")
    return run


def config(source, stage, folder, **changes):
    """As much of a stage's config as is looked at: that of the recorded model, with `a__b=value` for `a.b`."""
    model = {
        "scaling_factor": "measure",
        "autoencoder": {"_target_": "ldm_lab.models.vq_model.VQModel", **WIDTHS},
        "unet": {"_target_": "ldm_lab.models.unet.UNet2DModel", "dropout": 0.1},
        "scheduler": {"_target_": "ldm_lab.diffusion.ddim.DDIMScheduler", "timestep_spacing": "trailing"},
    }
    own = LDMPipeline.from_pretrained(MODEL)
    keys = ("in_channels", "out_channels", "block_out_channels", "down_block_types", "up_block_types")
    model["unet"] |= {key: own.unet.config[key] for key in (*keys, "layers_per_block", "attention_head_dim")}
    model["unet"]["norm_num_groups"] = 8
    model["scheduler"] |= {key: own.scheduler.config[key] for key in initial.OF_WEIGHTS}
    for key, value in changes.items():
        part, name = key.split("__")
        model[part][name] = value
    return {"init": str(source), "stage": stage, "plugins": [], "paths": {"stage": str(folder)}, "model": model}


# What comes along


@pytest.mark.parametrize("stage", STAGES)
def test_a_config_that_agrees_stays_as_it_is(tmp_path, stage, capsys):
    assert initial.settings(config(MODEL, stage, tmp_path), typed={"model.unet", "model.autoencoder"}) == {}
    assert capsys.readouterr().out == f"init: {stage} starts from {MODEL}\n"
    assert initial.settings({**config("x", stage, tmp_path), "init": None}, typed=()) == {}


DIFFERENT = [
    ("autoencoder", "autoencoder__block_out_channels", [8, 8], [16, 32]),
    ("autoencoder", "autoencoder__mid_block_add_attention", False, True),  # a default of the class
    ("diffusion", "unet__layers_per_block", 2, 1),
    ("diffusion", "scheduler__beta_end", 0.0155, 0.0195),
    ("diffusion", "scheduler__prediction_type", "v_prediction", "epsilon"),
    ("diffusion", "scheduler__num_train_timesteps", 500, 1000),
    ("diffusion", "scheduler__rescale_betas_zero_snr", True, False),
]


@pytest.mark.parametrize(("stage", "key", "mine", "theirs"), DIFFERENT)
def test_what_a_file_says_is_replaced_and_what_was_typed_is_refused(tmp_path, stage, key, mine, theirs, capsys):
    asked, name = config(MODEL, stage, tmp_path, **{key: mine}), f"model.{key.replace('__', '.')}"
    assert initial.settings(asked, typed={"seed", "model.optimizer.lr"}) == {name: theirs}
    assert f"init: {name} {mine} -> {theirs}, from {MODEL}\n" in capsys.readouterr().out
    for typed in (name, name.rpartition(".")[0]):
        with pytest.raises(ValueError) as error:
            initial.settings(asked, typed={typed})
        assert str(error.value) == f"{name}={mine}, but init={MODEL} was trained with {theirs}: leave {name} out"


def test_open_channels_are_those_of_the_source_without_a_word(tmp_path, capsys):
    asked = config(MODEL, "diffusion", tmp_path, unet__in_channels=None, unet__out_channels=None)
    channels = {"model.unet.in_channels": 3, "model.unet.out_channels": 3}
    assert initial.settings(asked, typed={"model.unet"}) == channels
    assert "channels" not in capsys.readouterr().out


def test_what_weights_do_not_depend_on_stays(tmp_path):
    asked = config(MODEL, "diffusion", tmp_path, unet__sample_size=99, unet__dropout=0.5, scheduler__clip_sample=True)
    assert initial.settings(asked, typed=()) == {}


def test_a_first_stage_brings_its_scale(tmp_path, run):
    assert initial.settings(config(run, "autoencoder", tmp_path), typed=()) == {
        "model.autoencoder.scaling_factor": 0.75
    }


def test_another_kind_of_network_is_refused(tmp_path):
    asked = config(MODEL, "autoencoder", tmp_path, autoencoder___target_="ldm_lab.models.kl_model.AutoencoderKL")
    message = r"model.autoencoder is ldm_lab.models.kl_model.AutoencoderKL, but init=.*ldm_tiny holds VQModel: choose"
    with pytest.raises(ValueError, match=message):
        initial.settings(asked, typed=())


def test_a_bare_unet_leaves_the_schedule_as_configured(tmp_path, capsys):
    asked = config(MODEL / "unet", "diffusion", tmp_path, scheduler__beta_end=0.0155)
    assert initial.settings(asked, typed=()) == {}
    assert f"init: {MODEL}/unet has no scheduler; model.scheduler stands\n" in capsys.readouterr().out


def test_a_stage_that_has_a_state_keeps_its_settings(tmp_path, capsys):
    """Whatever has become of the source."""
    started = config("gone", "diffusion", tmp_path, unet__layers_per_block=3)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**started, "max_images": 64}))
    (tmp_path / "final").mkdir()
    changes = initial.settings(config("gone", "diffusion", tmp_path), typed={"model.unet.norm_num_groups"})
    assert changes["model.unet.layers_per_block"] == 3
    assert changes["model.scheduler.timestep_spacing"] == "trailing"
    assert {key.rpartition(".")[0] for key in changes} == {"model.unet", "model.scheduler"}
    assert "model.unet.norm_num_groups" not in changes  # typed: what differs from before is shown as such
    assert capsys.readouterr().out == ""


# Where weights come from


def sources(run):
    return {
        "autoencoder": [run, run / "autoencoder", run / "autoencoder/final", run / "autoencoder/checkpoints/last.ckpt"],
        "diffusion": [run, run / "diffusion", run / "diffusion/checkpoints/last.ckpt"],
    }


@pytest.mark.parametrize("place", range(4))
def test_a_first_stage_starts_from_whatever_holds_one(tmp_path, run, pipe, place):
    source = sources(run)["autoencoder"][place]
    module = stage_1(VQModel.from_config(pipe.vqvae.config))
    initial.load(module, config(source, "autoencoder", tmp_path), typed=())
    expected = load_autoencoder(run / "diffusion/checkpoints/last.ckpt") if source == run else pipe.vqvae
    assert_equal_weights(module.autoencoder, expected)
    codes = module.autoencoder.quantize.embedding.weight.detach().clone()
    module.codebook.update(module.autoencoder.quantize, torch.randn(2, 3, 8, 8), torch.arange(64), step=0, seed=0)
    assert torch.equal(module.autoencoder.quantize.embedding.weight, codes), "the codes were drawn anew"


@pytest.mark.parametrize("place", range(3))
def test_a_unet_starts_from_averaged_weights(tmp_path, run, pipe, place):
    module = stage_2(pipe, scaling_factor="measure")
    initial.load(module, config(sources(run)["diffusion"][place], "diffusion", tmp_path), typed=())
    averaged = LDMPipeline.from_pretrained(run).unet
    for network in (module.unet, module.ema.model):
        assert_equal_weights(network, averaged)
    assert (module.images_seen, int(module.ema.num_updates)) == (0, 0)
    assert all(parameter.requires_grad for parameter in module.unet.parameters())


@pytest.mark.parametrize(
    "source", ["run@8", "run/diffusion/snapshots/000000008", "run/diffusion/snapshots/000000008/unet"]
)
def test_a_unet_starts_from_a_snapshot_or_a_folder_of_its_own(tmp_path, run, pipe, source):
    module = trained(stage_2(pipe))
    initial.load(module, config(tmp_path / source, "diffusion", tmp_path), typed=())
    assert_equal_weights(module.unet, pipe.unet)


def test_an_unfinished_first_stage_is_taken_as_it_stands(tmp_path, pipe):
    module = trained(stage_1(copy.deepcopy(pipe.vqvae)))
    checkpoint.save(state_of(module), tmp_path / "run/autoencoder/checkpoints/last.ckpt")
    other = stage_1(VQModel.from_config(pipe.vqvae.config))
    initial.load(other, config(tmp_path / "run", "autoencoder", tmp_path), typed=())
    assert_equal_weights(other.autoencoder, module.autoencoder)


@pytest.mark.parametrize(
    ("source", "stage", "message"),
    [
        ("nowhere", "diffusion", "nowhere: no such file or folder"),
        ("run@2M", "diffusion", "run@2M: there is no such snapshot; there are 8"),
        ("run/autoencoder/final", "diffusion", r"init=.*/final: there is no UNet here"),
        ("run/autoencoder", "diffusion", r"init=.*/autoencoder: there is no UNet here"),
        ("run/diffusion/snapshots/000000008/unet", "autoencoder", r"init=.*/unet: there is no first stage here"),
        ("run/diffusion/snapshots", "autoencoder", r"init=.*/snapshots: there is no first stage here"),
    ],
)
def test_what_cannot_be_started_from(tmp_path, run, source, stage, message):
    with pytest.raises(LoadError, match=message):
        initial.settings(config(tmp_path / source, stage, tmp_path), typed=())


# The scale of the latents


@pytest.mark.parametrize("mine", ["measure", 1.0, 0.75])
def test_the_scale_of_the_same_latents_comes_along(tmp_path, run, pipe, mine, capsys):
    module = stage_2(pipe, scaling_factor=mine)
    with torch.no_grad():
        module.autoencoder.decoder.conv_out.bias.add_(1)  # a decoder that was trained on: the latents are the same
    asked = config(tmp_path / "run@8", "diffusion", tmp_path)
    initial.load(module, asked, typed=())
    assert (module.autoencoder.config.scaling_factor, module.measures_scale) == (0.75, False)
    said = "" if mine == 0.75 else f"init: model.scaling_factor {mine} -> 0.75, from {run}@8\n"
    assert capsys.readouterr().out == said
    if mine != 0.75:
        module = stage_2(pipe, scaling_factor=mine)
        message = f"model.scaling_factor={mine}, but the UNet of init={run}@8 was trained with 0.75: leave"
        with pytest.raises(ValueError, match=message):
            initial.load(module, asked, typed={"model.scaling_factor"})


@pytest.mark.parametrize(
    ("source", "why"), [("run@8", "was trained on another autoencoder"), ("unet", "comes without an autoencoder")]
)
def test_other_latents_have_their_own_scale(tmp_path, run, pipe, source, why, capsys):
    pipe.unet.save_pretrained(tmp_path / "unet")
    module = stage_2(pipe, scaling_factor="measure")
    with torch.no_grad():
        module.autoencoder.encoder.conv_in.bias.add_(1)
    initial.load(module, config(tmp_path / source, "diffusion", tmp_path), typed={"model.scaling_factor"})
    assert module.measures_scale
    said = f"init: the UNet of {tmp_path}/{source} {why}; model.scaling_factor=measure stands\n"
    assert capsys.readouterr().out == said


# From the command line


STAGE_2 = "experiment=celebahq/diffusion"


def started(tiny_runs, *more):
    return [STAGE_2, f"init={tiny_runs}/celebahq", f"autoencoder={tiny_runs}/celebahq", *more]


def test_a_stage_goes_on_from_the_weights_of_another_run(tiny_runs, tmp_path, capsys):
    """With a rate of nothing it stays where the other ended; it resumes from its own state, not from there again."""
    loss = train(tmp_path, *started(tiny_runs, "model.optimizer.lr=1e-12"))
    assert loss == pytest.approx(metrics(tiny_runs / "celebahq/diffusion")[64]["val/loss"], rel=1e-5)
    assert sorted(metrics(tmp_path / "celebahq/diffusion")) == [*range(8, 72, 8)]
    lines = capsys.readouterr().out.splitlines()
    assert f"init: diffusion starts from {tiny_runs}/celebahq" in lines

    train(tmp_path, *started(tiny_runs, "model.optimizer.lr=1e-12", "max_images=72"))
    lines = capsys.readouterr().out.splitlines()
    assert not [line for line in lines if line.startswith("init:")]
    assert "max_images 64 -> 72: the learning rate stays at 1e-12" in lines
    with pytest.raises(ValueError, match=r"other settings: init: .*/celebahq -> None"):
        train(tmp_path, STAGE_2, f"autoencoder={tiny_runs}/celebahq", "model.optimizer.lr=1e-12", "max_images=72")


def test_settings_that_weights_do_not_fit(tiny_runs, tmp_path):
    for typed, message in (
        ("model.unet.layers_per_block=2", "model.unet.layers_per_block=2, but init=.* was trained with 1"),
        ("model.scheduler.beta_end=0.1", "model.scheduler.beta_end=0.1, but init=.* was trained with 0.0195"),
        ("model.scaling_factor=0.5", "model.scaling_factor=0.5, but the UNet of init=.* was trained with 1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            train(tmp_path, *started(tiny_runs, typed))
    assert not list(tmp_path.rglob("*.ckpt"))


def test_both_stages_take_the_shapes_of_the_source(tiny_runs, tmp_path, capsys):
    """The demo's own networks have other losses and predictions; what refers to a replaced setting follows it."""
    VQModel(**{**WIDTHS, "num_vq_embeddings": 48}).save_pretrained(tmp_path / "first")
    train(tmp_path, "experiment=celebahq/autoencoder", f"init={tmp_path}/first", "max_images=8")
    lines = capsys.readouterr().out.splitlines()
    assert f"init: model.autoencoder.num_vq_embeddings 32 -> 48, from {tmp_path}/first" in lines
    assert load_autoencoder(tmp_path / "celebahq").config.num_vq_embeddings == 48

"""Whole checkpoints of CompVis/latent-diffusion: what the original makes of them, and what is refused."""

import copy
import itertools
import json
import math
import sys
import types

import pytest
import torch
import yaml
from safetensors.torch import load_file

from ldm_lab import AutoencoderKL, LDMPipeline, VQModel
from ldm_lab.checkpoints.compvis.checkpoint import read_state
from ldm_lab.utils.reading import LoadError
from tests.helpers import GOLDEN, Malicious, assert_close_relative

FOLDER = GOLDEN / "compvis"
CHECKPOINT = FOLDER / "model.ckpt"
META = json.loads((FOLDER / "meta.json").read_text())
IO = load_file(FOLDER / "ckpt_io.safetensors")
STATE = torch.load(CHECKPOINT, weights_only=True)["state_dict"]
FIRST_STAGE = "first_stage_model."


def autoencoder(name, target):
    params = {**META["arch"][name], "lossconfig": {"target": "torch.nn.Identity"}}
    return {"target": f"ldm.models.autoencoder.{target}", "params": params}


def original_config():
    return {
        "model": {
            "base_learning_rate": 2.0e-06,
            "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
            "params": {
                "linear_start": META["schedule"]["linear_start"],
                "linear_end": META["schedule"]["linear_end"],
                "num_timesteps_cond": 1,
                "log_every_t": 200,
                "timesteps": META["schedule"]["timesteps"],
                "first_stage_key": "image",
                "unet_config": {
                    "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
                    "params": META["arch"]["ckpt_unet"],
                },
                "first_stage_config": autoencoder("ckpt_vq", "VQModelInterface"),
                "cond_stage_config": "__is_unconditional__",
            },
        },
        "data": {"target": "main.DataModuleFromConfig"},
    }


@pytest.fixture
def write(tmp_path):
    """Writes a changed checkpoint, or a changed config; returns the path."""

    def write(content, name="model.ckpt"):
        path = tmp_path / name
        if name.endswith(".yaml"):
            path.write_text(yaml.safe_dump(content))
        else:
            torch.save({"state_dict": content, "global_step": 1, "callbacks": {}}, path)
        return path

    return write


@pytest.fixture
def config(write):
    return write(original_config(), "config.yaml")


def load(path, config, **options):
    pipe = LDMPipeline.from_single_file(path, config, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def without(key):
    return {name: value for name, value in STATE.items() if name != key}


def refusal(call, *args, **kwargs):
    """The message of the one line with which `call` ends."""
    with pytest.raises(LoadError) as error:
        call(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


# What the original makes of it.


@torch.no_grad()
def test_the_first_stage_and_its_scale(config):
    pipe = load(CHECKPOINT, config)
    scale = pipe.vqvae.config.scaling_factor
    assert scale == STATE["scale_factor"].item() != 1
    assert_close_relative(scale * pipe.vqvae.encode(IO["in.image"]).latents, IO["latent_scaled"])
    assert not pipe.vqvae.training
    assert not pipe.unet.training


@torch.no_grad()
@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_prediction_and_ddim(config, weights):
    pipe = load(CHECKPOINT, config, **({} if weights == "ema" else {"use_ema": False}))
    assert_close_relative(pipe.unet(IO["in.unet_x"], IO["in.unet_t"]).sample, IO[f"unet_{weights}"])
    latents = pipe(latents=IO["in.xT"], eta=0.0, num_inference_steps=10, output_type="latent").images
    assert pipe.scheduler.timesteps.tolist() == list(range(901, 0, -100))
    assert_close_relative(latents, IO[f"ddim10_eta0_{weights}_latent"])


@torch.no_grad()
def test_images(config):
    pipe = load(CHECKPOINT, config)
    latents = pipe(latents=IO["in.xT"], num_inference_steps=10, output_type="latent").images
    assert_close_relative(pipe.decode(latents), IO["ddim10_eta0_ema_image"])


@torch.no_grad()
def test_a_folder_of_it_is_the_same_pipeline(config, tmp_path):
    load(CHECKPOINT, config).save_pretrained(tmp_path / "folder")
    pipe = LDMPipeline.from_pretrained(tmp_path / "folder")
    pipe.set_progress_bar_config(disable=True)
    latents = pipe(latents=IO["in.xT"], num_inference_steps=10, output_type="latent").images
    assert_close_relative(latents, IO["ddim10_eta0_ema_latent"])
    assert_close_relative(pipe.decode(latents), IO["ddim10_eta0_ema_image"])


def test_type_of_the_networks(config):
    assert load(CHECKPOINT, config, torch_dtype=torch.bfloat16).dtype == torch.bfloat16


# What a file or its config leaves open.


def test_scale_as_a_setting_or_absent(write, config):
    path = write(without("scale_factor"))
    assert load(path, config).vqvae.config.scaling_factor == 1.0
    changed = original_config()
    changed["model"]["params"]["scale_factor"] = 0.25
    assert load(path, write(changed, "scaled.yaml")).vqvae.config.scaling_factor == 0.25


def test_betas_are_those_of_the_file_else_of_the_config(write):
    other = original_config()
    other["model"]["params"] |= {"linear_start": "1e-3", "linear_end": 0.02}
    other = write(other, "other.yaml")
    scheduler = load(CHECKPOINT, other).scheduler
    torch.testing.assert_close(scheduler.betas, STATE["betas"], rtol=0, atol=0)
    torch.testing.assert_close(scheduler.alphas_cumprod, STATE["alphas_cumprod"], rtol=1e-5, atol=0)
    scheduler = load(write(without("betas")), other).scheduler
    assert (scheduler.config.beta_start, scheduler.config.beta_end) == (0.001, 0.02)
    assert scheduler.config.trained_betas is None


def test_the_cosine_schedule(write):
    """Nichol & Dhariwal 2021, eq. 17."""
    path = write(without("betas"))
    betas = load(path, write(changed("beta_schedule", "cosine"), "cosine.yaml")).scheduler.betas
    alpha_bar = [math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(1001)]
    expected = [min(1 - alpha_bar[t + 1] / alpha_bar[t], 0.999) for t in range(1000)]
    torch.testing.assert_close(betas, torch.tensor(expected), rtol=1e-6, atol=1e-9)


def test_what_is_left_out_by_rule(write, config):
    path = write({**STATE, "logvar": torch.zeros(1000), "lvlb_weights": torch.zeros(1000)})
    assert len(load(path, config).unet.state_dict()) > 0


# First stages alone.


@torch.no_grad()
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("stage_2_config", [False, True])
def test_a_first_stage_alone(write, whole, stage_2_config):
    own = {key.removeprefix(FIRST_STAGE): value for key, value in STATE.items() if key.startswith(FIRST_STAGE)}
    path = CHECKPOINT if whole else write({**own, "loss.discriminator.main.0.weight": torch.zeros(1)})
    content = original_config() if stage_2_config else {"model": autoencoder("ckpt_vq", "VQModel")}
    model = VQModel.from_single_file(path, write(content, "config.yaml"))
    assert isinstance(model, VQModel)
    assert not model.training
    assert model.config.scaling_factor == 1.0
    assert_close_relative(STATE["scale_factor"] * model.encode(IO["in.image"]).latents, IO["latent_scaled"])


@torch.no_grad()
def test_a_first_stage_with_a_gaussian(write):
    state = {key: value.float() for key, value in load_file(FOLDER / "kl_state.safetensors").items()}
    config = write({"model": autoencoder("kl", "AutoencoderKL")}, "config.yaml")
    model = AutoencoderKL.from_single_file(write({**state, "loss.logvar": torch.zeros(())}), config)
    assert isinstance(model, AutoencoderKL)
    expected = load_file(FOLDER / "io.safetensors")
    assert_close_relative(model.decode(expected["in.kl_latent"]).sample, expected["kl.decode"])


# Files that hold more than data.


def test_callbacks_kept_by_their_class_are_read_without_it():
    assert len(read_state(FOLDER / "legacy_callbacks.ckpt")) == 4
    assert "pytorch_lightning" not in sys.modules


@pytest.mark.parametrize(
    ("module", "accepted"), [("pytorch_lightning.callbacks.model_checkpoint", True), ("elsewhere.callbacks", False)]
)
def test_only_the_classes_of_callbacks_are_passed_over(monkeypatch, tmp_path, config, module, accepted):
    foreign = types.ModuleType(module)
    foreign.Callback = type("Callback", (), {"__module__": module})
    path, before = tmp_path / "model.ckpt", len(torch.serialization.get_safe_globals())
    with monkeypatch.context() as patch:
        for name in itertools.accumulate(module.split("."), "{}.{}".format):
            patch.setitem(sys.modules, name, foreign)
        torch.save({"state_dict": STATE, "callbacks": {foreign.Callback: {"best_model_path": "x"}}}, path)
    if accepted:
        assert_close_relative(load(path, config).scheduler.betas, STATE["betas"])
        assert len(torch.serialization.get_safe_globals()) == before
    else:
        assert "could run code" in refusal(load, path, config)
    assert module not in sys.modules


@pytest.mark.parametrize("place", ["callbacks", "state_dict"])
def test_code_in_a_file_is_not_run(tmp_path, config, place):
    path, trace = tmp_path / "model.ckpt", tmp_path / "trace"
    torch.save({"state_dict": STATE, place: {"x": Malicious(trace)}}, path)
    assert "could run code" in refusal(load, path, config)
    assert "could run code" in refusal(VQModel.from_single_file, path, config)
    assert not trace.exists()


def test_a_damaged_file_is_refused(tmp_path, config):
    path = tmp_path / "model.ckpt"
    path.write_bytes(CHECKPOINT.read_bytes()[:100_000])
    assert str(path) in refusal(load, path, config)
    path.write_bytes(b"")
    assert str(path) in refusal(load, path, config)
    assert refusal(load, tmp_path / "none.ckpt", config).endswith("none.ckpt: no such file")
    torch.save(STATE["betas"], path)
    assert "there is no state_dict of tensors" in refusal(load, path, config)


# Nothing missing, nothing unexpected.

MISSING = {
    "model.diffusion_model.out.2.weight": "there is no place for 'model_ema.diffusion_modelout2weight' (1 left over)",
    "model_ema.diffusion_modelout2weight": "no tensor 'model_ema.diffusion_modelout2weight' (1 missing)",
    "first_stage_model.quantize.embedding.weight": "no tensor 'quantize.embedding.weight' for this VQModel (1 missing)",
}
UNEXPECTED = {
    "colour": "there is no place for 'colour' (1 left over)",
    "model_ema.colour": "there is no place for 'model_ema.colour' (1 left over)",
    "first_stage_model.colour": "CompVis tensor 'colour' has no counterpart in VQModel (1 such)",
    "cond_stage_model.embedding.weight": "a conditional model (it holds 'cond_stage_model.embedding.weight')",
    "model.diffusion_model.label_emb.weight": "a conditional model",
    "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": "a conditional model",
}


@pytest.mark.parametrize("key", MISSING)
def test_a_missing_tensor_is_refused(write, config, key):
    path = write(without(key))
    message = refusal(load, path, config)
    assert message.startswith(f"{path}: ")
    assert MISSING[key] in message


@pytest.mark.parametrize("key", UNEXPECTED)
def test_an_unexpected_tensor_is_refused(write, config, key):
    path = write({**STATE, key: torch.zeros(1)})
    message = refusal(load, path, config)
    assert message.startswith(f"{path}: ")
    assert UNEXPECTED[key] in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"betas": torch.full((1000,), float("nan"))}, "trained_betas[0]=nan is not allowed"),
        ({"betas": torch.tensor(0.1)}, "trained_betas must be a list"),
        ({"scale_factor": torch.ones(3)}, "scale_factor has shape (3,), must be one number"),
        ({"model_ema.diffusion_modelout2bias": torch.zeros(7)}, "conv_out.bias has shape (7,)"),
        ({3: torch.zeros(1)}, "not a checkpoint of CompVis: there is no state_dict of tensors"),
        ({"betas": [0.1]}, "not a checkpoint of CompVis: there is no state_dict of tensors"),
    ],
)
def test_a_tensor_that_cannot_be_right_is_refused(write, config, changes, message):
    path = write({**STATE, **changes})
    assert refusal(load, path, config).startswith(f"{path}: {message}")


def test_raw_weights_are_checked_too(write, config):
    path = write(without("model.diffusion_model.out.2.weight"))
    assert "no tensor 'conv_out.weight' for this UNet2DModel" in refusal(load, path, config, use_ema=False)


@pytest.mark.parametrize(
    ("prefix", "message"),
    [
        ("first_stage_model.", "it holds no first stage (first_stage_model.*)"),
        ("model.diffusion_model.", "it holds no UNet (model.diffusion_model.*)"),
        ("model_ema.", "holds no moving average (model_ema.*): use_ema=False takes the weights themselves"),
    ],
)
def test_a_file_without_one_of_the_networks_is_refused(write, config, prefix, message):
    path = write({key: value for key, value in STATE.items() if not key.startswith(prefix)})
    assert message in refusal(load, path, config)


# The config.


def changed(where, value):
    content = copy.deepcopy(original_config())
    *sections, key = where.split(".")
    node = content["model"]["params"]
    for section in sections:
        node = node[section]
    node[key] = value
    return content


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        ("cond_stage_config", {"target": "BERTEmbedder"}, "a conditional model (cond_stage_config)"),
        ("first_stage_config.target", "ldm.IdentityFirstStage", "target is IdentityFirstStage; known are VQModel"),
        ("first_stage_config.params.colour", 1, "colour=1 is not a key that is understood"),
        (
            "first_stage_config.params.ddconfig",
            1,
            "there is no section model.params.first_stage_config.params.ddconfig",
        ),
        ("unet_config", None, "there is no section model.params.unet_config.params"),
        ("unet_config.params.channel_mult", 1, "unet_config: channel_mult=1 must be a list of positive integers"),
        ("unet_config.params.channel_mult", [2, 2], "channel_mult=[2, 2] is not supported; a list that begins with 1"),
        ("first_stage_config.params.ddconfig.ch_mult", [2, 2], "ch_mult=[2, 2] is not supported; a list that begins"),
        ("unet_config.params.model_channels", "32", "unet_config: model_channels='32' must be a positive integer"),
        ("first_stage_config.params.embed_dim", None, "embed_dim=None must be a positive integer"),
        ("first_stage_config.params.ddconfig.ch_mult", "1,2", "ddconfig: ch_mult='1,2' must be a list of positive"),
        ("first_stage_config.params.ddconfig.resolution", 32.5, "ddconfig: resolution=32.5 must be a positive integer"),
        ("unet_config.params.num_res_blocks", 2, "CompVis tensor 'input_blocks.2.0.op.bias' has no counterpart"),
        ("unet_config.params.num_res_blocks", -1, "unet_config: num_res_blocks=-1 must be a positive integer"),
        ("parameterization", "v", "parameterization='v' is not supported; eps or x0 is"),
        ("beta_schedule", "sqrt", "beta_schedule='sqrt' is not supported; linear or sqrt_linear or cosine is"),
        ("linear_start", "small", "linear_start='small' is not a number"),
        ("linear_start", 2, "beta_start"),
    ],
)
def test_a_config_that_ours_cannot_express_is_refused(write, where, value, message):
    assert message in refusal(load, CHECKPOINT, write(changed(where, value), "config.yaml"))


def test_a_config_that_is_none_is_refused(tmp_path):
    path = tmp_path / "config.yaml"
    assert refusal(load, CHECKPOINT, path).endswith("config.yaml: no such file")
    path.write_text("model: [")
    assert "not readable as YAML" in refusal(load, CHECKPOINT, path)
    path.write_text(f"!!python/object/apply:builtins.open ['{tmp_path / 'trace'}', 'w']")
    assert "not readable as YAML" in refusal(load, CHECKPOINT, path)
    assert not (tmp_path / "trace").exists()
    path.write_text("[1, 2]")
    assert "config.yaml: holds a list, not an object" in refusal(load, CHECKPOINT, path)
    path.write_text("model: 2")
    assert "there is no section model.params" in refusal(load, CHECKPOINT, path)

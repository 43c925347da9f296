"""Models that others published, from the command line: a CompVis checkpoint is sampled, trained on and started from."""

import functools
import shutil

import pytest
import torch
import yaml
from huggingface_hub import constants
from safetensors.torch import load_file

import sample
from ldm_lab import LDMPipeline
from ldm_lab.sampling.files import RGB_PNG
from ldm_lab.utils.reading import LoadError, read_json
from tests.checkpoints.test_compvis_checkpoint import CHECKPOINT, IO, STATE, original_config
from tests.helpers import GOLDEN, Malicious, assert_close_relative, contents
from tests.hub_server import Hub, point_to
from tests.trained import train

FOLDER = GOLDEN / "diffusers/ldm_tiny"
STAGE_2 = "experiment=avatars/diffusion"


@pytest.fixture
def model(tmp_path):
    """A folder as the original's archives unpack to: the checkpoint, and its config beside it."""
    folder = tmp_path / "celeba256"
    folder.mkdir()
    shutil.copy(CHECKPOINT, folder / "model.ckpt")
    (folder / "config.yaml").write_text(yaml.safe_dump(original_config()))
    return folder / "model.ckpt"


def draw(*settings):
    sample.job(["num_samples=2", "batch_size=2", "sampler.steps=10", "trainer=cpu", *settings])


@torch.no_grad()
def test_a_compvis_checkpoint_is_sampled(model, tmp_path, capsys):
    draw(f"ckpt={model}")
    folder = model.parent / "model_samples/ddim_10_eta0_seed0"
    assert f"2 samples (2 new) in {folder}" in capsys.readouterr().out
    assert RGB_PNG.path(folder, 1).is_file()
    scheduler = read_json(folder / "manifest.json")["scheduler"]
    assert (scheduler["steps_offset"], scheduler["set_alpha_to_one"]) == (1, False)

    moved = tmp_path / "elsewhere.yaml"
    (model.parent / "config.yaml").rename(moved)
    draw(f"ckpt={model}", f"original_config={moved}", f"output={tmp_path}/given")
    for index in range(2):
        assert RGB_PNG.path(folder, index).read_bytes() == RGB_PNG.path(tmp_path / "given", index).read_bytes()


@torch.no_grad()
def test_every_way_in_gives_the_same_model(model):
    pipe = LDMPipeline.from_pretrained(model)
    assert_close_relative(pipe.unet(IO["in.unet_x"], IO["in.unet_t"]).sample, IO["unet_ema"])


@pytest.mark.parametrize("with_unet", [True, False])
def test_a_unet_is_trained_on_a_compvis_autoencoder(tmp_path, capsys, with_unet):
    """The run's own copy of the first stage is the original's, bit for bit, but for the scale it measures."""
    prefix = "first_stage_model."
    path, state = CHECKPOINT, {key.removeprefix(prefix): v for key, v in STATE.items() if key.startswith(prefix)}
    if not with_unet:
        path = tmp_path / "first_stage.ckpt"
        torch.save({"state_dict": {**state, "loss.logvar": torch.zeros(())}}, path)
    loss = train(tmp_path / "runs", STAGE_2, f"autoencoder={path}", "data.image_size=32")
    assert loss < 2
    weights = load_file(tmp_path / "runs/avatars/vqvae/diffusion_pytorch_model.safetensors")
    assert torch.equal(weights["encoder.conv_in.weight"], state["encoder.conv_in.weight"])
    assert torch.equal(weights["quantize.embedding.weight"], state["quantize.embedding.weight"])
    assert LDMPipeline.from_pretrained(tmp_path / "runs/avatars").vqvae.config.scaling_factor != 1


def test_a_training_starts_from_a_compvis_checkpoint(model, tmp_path, capsys):
    """With a learning rate of nothing, what comes out is what went in."""
    settings = ("model.optimizer.lr=1e-12", "max_images=16", "data.image_size=32")
    train(tmp_path / "runs", STAGE_2, f"init={model}", f"autoencoder={model}", *settings)
    assert "attention_head_dim" in capsys.readouterr().out
    pipe = LDMPipeline.from_pretrained(tmp_path / "runs/avatars")
    assert pipe.vqvae.config.scaling_factor == STATE["scale_factor"].item()
    assert pipe.scheduler.config.beta_end == pytest.approx(0.0195)
    with torch.no_grad():
        assert_close_relative(pipe.unet(IO["in.unet_x"], IO["in.unet_t"]).sample, IO["unet_ema"])


@pytest.mark.parametrize("use", ["ckpt", "autoencoder", "init"])
def test_code_in_a_file_is_not_run(tmp_path, use):
    path, trace = tmp_path / "model.ckpt", tmp_path / "trace"
    torch.save({"state_dict": STATE, "callbacks": {"x": Malicious(trace)}}, path)
    more = [f"autoencoder={FOLDER}"] if use == "init" else []
    command = draw if use == "ckpt" else functools.partial(train, tmp_path / "runs", STAGE_2, *more)
    with pytest.raises(LoadError, match="could run code and is not loaded") as error:
        command(f"{use}={path}")
    assert "\n" not in str(error.value)
    assert not trace.exists()


def test_a_folder_of_diffusers_is_sampled(tmp_path):
    for name in ("ldm_tiny", "ldm_tiny_legacy"):
        draw(f"ckpt={GOLDEN / 'diffusers' / name}", f"output={tmp_path / name}")
    one, other = (RGB_PNG.path(tmp_path / name, 0).read_bytes() for name in ("ldm_tiny", "ldm_tiny_legacy"))
    assert one == other


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with one model, and an empty folder to be in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    ours = Hub()
    ours.add("owner/tiny", contents(FOLDER))
    ours.add("owner/tiny", contents(FOLDER), revision="v1")
    point_to(monkeypatch, ours.endpoint)
    yield ours
    ours.close()


def test_a_model_of_the_hub_is_sampled(hub, tmp_path):
    draw("ckpt=owner/tiny")
    draw(f"ckpt={FOLDER}", "output=local")
    folder = tmp_path / "tiny_samples/ddim_10_eta0_seed0"
    assert RGB_PNG.path(folder, 1).read_bytes() == RGB_PNG.path(tmp_path / "local", 1).read_bytes()
    assert not (tmp_path / "owner").exists()  # the name would be taken for a folder from then on
    draw("ckpt=owner/tiny@v1", "output=other")
    assert any("v1" in path for path in hub.asked)
    with pytest.raises(LoadError, match="no revision 'v2'"):
        draw("ckpt=owner/tiny@v2")
    with pytest.raises(LoadError, match="owner/none: nothing local has this name"):
        draw("ckpt=owner/none")


def test_a_unet_is_trained_on_a_first_stage_of_the_hub(hub, tmp_path, capsys):
    train("runs", STAGE_2, "autoencoder=owner/tiny", "init=owner/tiny", "model.optimizer.lr=1e-12", "max_images=16")
    weights = [
        load_file(folder / "unet/diffusion_pytorch_model.safetensors")["conv_in.weight"]
        for folder in (FOLDER, tmp_path / "runs/avatars")
    ]
    assert_close_relative(*weights)


def test_arguments_of_the_hub(hub, tmp_path):
    pipe = LDMPipeline.from_pretrained("owner/tiny", torch.bfloat16, "cpu", revision="v1", cache_dir=tmp_path / "mine")
    assert pipe.dtype == torch.bfloat16
    assert any((tmp_path / "mine").iterdir())
    hub.close()
    again = LDMPipeline.from_pretrained("owner/tiny@v1", cache_dir=tmp_path / "mine", local_files_only=True)
    assert again.dtype == torch.float32
    with pytest.raises(LoadError, match="revision=v1 is for names on the hub"):
        LDMPipeline.from_pretrained(FOLDER, revision="v1")

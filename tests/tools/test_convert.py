"""`python -m ldm_lab convert SRC DST`: from every kind of source, a folder that is the same model."""

import pytest
import torch
import yaml

from ldm_lab import LDMPipeline, VQModel
from ldm_lab.models.autoencoders import load_autoencoder
from ldm_lab.tools import convert
from ldm_lab.utils.reading import LoadError
from tests.checkpoints.test_compvis_checkpoint import CHECKPOINT, IO, original_config
from tests.helpers import GOLDEN, assert_close_relative

FOLDER = GOLDEN / "diffusers/ldm_tiny"


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "original.yaml"
    path.write_text(yaml.safe_dump(original_config()))
    return path


def run(*arguments):
    convert.main([str(argument) for argument in arguments])


def prediction(folder):
    with torch.no_grad():
        return LDMPipeline.from_pretrained(folder).unet(IO["in.unet_x"], IO["in.unet_t"]).sample


def test_a_file_of_compvis(tmp_path, config, capsys):
    run(CHECKPOINT, tmp_path / "folder", "--original-config", config)
    assert_close_relative(prediction(tmp_path / "folder"), IO["unet_ema"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(CHECKPOINT)
    assert "VQModel, 0.2 M parameters in float32, f = 2, 3 channels, 32 codes, scaling_factor" in lines[1]
    assert "latents of 3 channels, 16 x 16, attention with heads of 16 channels" in lines[2]
    assert "DDIMScheduler, 1000 timesteps, scaled_linear 0.0015 to 0.0195, epsilon" in lines[3]
    assert lines[4] == f"written to {tmp_path / 'folder'}"


def test_its_weights_without_the_average(tmp_path, config):
    run(CHECKPOINT, tmp_path / "folder", "--original-config", config, "--raw")
    assert_close_relative(prediction(tmp_path / "folder"), IO["unet_raw"])


@pytest.mark.parametrize("name", ["ldm_tiny", "ldm_tiny_legacy"])
def test_a_folder_of_diffusers(tmp_path, name):
    source = GOLDEN / "diffusers" / name
    run(source, tmp_path / "folder")
    before, after = LDMPipeline.from_pretrained(source), LDMPipeline.from_pretrained(tmp_path / "folder")
    for part in ("unet", "vqvae"):
        one, other = (getattr(pipe, part).state_dict() for pipe in (before, after))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert before.scheduler.config == after.scheduler.config


@torch.no_grad()
def test_the_first_stage_alone(tmp_path, capsys):
    run(CHECKPOINT, tmp_path / "folder", "--first-stage")
    loaded = load_autoencoder(tmp_path / "folder")
    scale = torch.load(CHECKPOINT, weights_only=True)["state_dict"]["scale_factor"]
    assert_close_relative(scale * loaded.encode(IO["in.image"]).latents, IO["latent_scaled"])
    assert "autoencoder  VQModel" in capsys.readouterr().out
    run(FOLDER, tmp_path / "other", "--first-stage")
    expected = VQModel.from_pretrained(FOLDER, subfolder="vqvae").decoder.conv_out.weight
    assert torch.equal(load_autoencoder(tmp_path / "other").decoder.conv_out.weight, expected)


def test_the_type_of_the_weights(tmp_path):
    run(FOLDER, tmp_path / "folder", "--dtype", "float16")
    assert LDMPipeline.from_pretrained(tmp_path / "folder").dtype == torch.float16


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/precious.txt").write_text("kept")
    with pytest.raises(ValueError, match="is there already"):
        run(FOLDER, tmp_path / "folder")
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["precious.txt"]
    with pytest.raises(ValueError, match="is there already"):
        run(FOLDER, tmp_path / "folder/precious.txt")


def test_what_cannot_be_converted(tmp_path):
    with pytest.raises(LoadError, match="none: no such file or folder"):
        run(tmp_path / "none", tmp_path / "folder")
    with pytest.raises(ValueError, match="--first-stage needs neither"):
        run(CHECKPOINT, tmp_path / "folder", "--first-stage", "--raw")
    model = VQModel.from_pretrained(FOLDER, subfolder="vqvae")
    model.save_pretrained(tmp_path / "alone")
    with pytest.raises(LoadError, match="no pipeline"):
        run(tmp_path / "alone", tmp_path / "folder")
    assert not (tmp_path / "folder").exists()

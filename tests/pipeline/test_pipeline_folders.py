"""Pipeline folders: ours, those of diffusers, and what is not one."""

import inspect
import json
import shutil

import numpy as np
import pytest
import torch

from ldm_lab import DDPMScheduler, LDMPipeline
from ldm_lab.utils.reading import LoadError
from tests.helpers import GOLDEN
from tests.models.weights import assert_equal_weights

FOLDER = GOLDEN / "diffusers" / "ldm_tiny"


def load(folder=FOLDER, kind=LDMPipeline):
    pipe = kind.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, seed=3):
    return pipe(2, torch.Generator().manual_seed(seed), num_inference_steps=4, output_type="np").images


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(FOLDER, tmp_path / "pipeline")


def edit(path, **changes):
    value = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: entry for key, entry in value.items() if entry is not ...}))


def test_there_and_back(tmp_path):
    pipe = load()
    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config, variance_type="fixed_large")
    pipe.vqvae.register_to_config(scaling_factor=0.25)
    pipe.save_pretrained(tmp_path / "new" / "folder")
    back = load(tmp_path / "new" / "folder")
    for name in ("unet", "vqvae"):
        assert_equal_weights(getattr(back, name), getattr(pipe, name))
        assert not getattr(back, name).training
    assert type(back.scheduler) is DDPMScheduler
    assert {name: part.config for name, part in back.components.items()} == {
        name: part.config for name, part in pipe.components.items()
    }
    assert np.array_equal(draw(back), draw(pipe))


def test_the_folder_holds_what_the_namesake_holds(tmp_path):
    load().save_pretrained(tmp_path)
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()} == {
        "model_index.json",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vqvae/config.json",
        "vqvae/diffusion_pytorch_model.safetensors",
    }


def test_the_index_is_written_last(tmp_path, monkeypatch):
    """A folder without an index is no pipeline: half a folder must not look like a whole one."""
    pipe = load()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(pipe.scheduler, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        pipe.save_pretrained(tmp_path)
    assert not (tmp_path / "model_index.json").exists()


def test_a_foreign_autoencoder_without_the_key_is_not_scaled(folder):
    """The published VQ folders leave it out, and the namesake's default turns their images to garbage."""
    edit(folder / "vqvae" / "config.json", scaling_factor=...)
    pipe = load(folder)
    assert pipe.vqvae.config.scaling_factor == 1.0
    unscaled = load()
    unscaled.vqvae.register_to_config(scaling_factor=1.0)
    assert np.array_equal(draw(pipe), draw(unscaled))


@pytest.mark.parametrize("library", ["diffusers", "ldm_lab"])
def test_classes_of_these_libraries_are_known(folder, library):
    edit(folder / "model_index.json", unet=[library, "UNet2DModel"])
    load(folder)


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("unet", ["diffusers", "UNet2DConditionModel"]),
        ("unet", ["diffusers", "VQModel"]),
        ("vqvae", ["ldm_lab.training.run", "RunFolder"]),
        ("scheduler", ["diffusers", "PNDMScheduler"]),
        ("scheduler", ["diffusers", "DDIMScheduler", "more"]),
        ("scheduler", "DDIMScheduler"),
        ("vqvae", ["", "VQModel"]),
        ("unet", {"a": 1}),
        ("unet", None),
        ("unet", ...),
    ],
)
def test_classes_that_are_not_known_are_refused(folder, name, entry):
    edit(folder / "model_index.json", **{name: entry})
    with pytest.raises(LoadError, match=rf"model_index.json: {name} is .*; known are diffusers\.") as error:
        load(folder)
    assert "\n" not in str(error.value)


def test_another_kind_of_pipeline_is_refused(folder):
    edit(folder / "model_index.json", _class_name="StableDiffusionPipeline")
    with pytest.raises(LoadError, match=r"model_index.json: a 'StableDiffusionPipeline', not an LDMPipeline"):
        load(folder)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("unet", "unet/config.json: no such file"),
        ("vqvae/diffusion_pytorch_model.safetensors", "vqvae: neither .* is there"),
        ("scheduler/scheduler_config.json", "scheduler/scheduler_config.json: no such file"),
    ],
)
def test_a_part_that_is_missing(folder, path, message):
    target = folder / path
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    with pytest.raises(LoadError, match=message):
        load(folder)


def test_what_is_no_pipeline(tmp_path):
    with pytest.raises(LoadError, match="nowhere: no such file or folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(LoadError, match=r"no pipeline \(model_index.json\) and no diffusion checkpoint"):
        load(tmp_path)
    (tmp_path / "file.txt").write_text("hello")
    with pytest.raises(LoadError, match=r"file.txt: "):
        load(tmp_path / "file.txt")


@pytest.fixture(scope="module")
def theirs():
    return pytest.importorskip("diffusers").LDMPipeline


def assert_same_images(ours, theirs):
    np.testing.assert_allclose(draw(ours), draw(theirs), atol=1e-4, rtol=0)


def test_diffusers_loads_ours_and_draws_the_same(theirs, tmp_path):
    ours = load()
    ours.vqvae.register_to_config(scaling_factor=1.5)
    ours.save_pretrained(tmp_path)
    assert_same_images(ours, load(tmp_path, theirs))


def test_ours_loads_what_diffusers_saved_and_draws_the_same(theirs, tmp_path):
    reference = load(FOLDER, theirs)
    reference.save_pretrained(tmp_path)
    assert_same_images(load(tmp_path), reference)


def test_the_namesake_is_called_alike(theirs):
    ours = list(inspect.signature(LDMPipeline.__call__).parameters.values())
    namesake = [p for p in inspect.signature(theirs.__call__).parameters.values() if p.kind is not p.VAR_KEYWORD]
    assert [(p.name, p.default) for p in ours[: len(namesake)]] == [(p.name, p.default) for p in namesake]
    own = list(inspect.signature(LDMPipeline.__init__).parameters)
    assert own == [*inspect.signature(theirs.__init__).parameters, "guide"]

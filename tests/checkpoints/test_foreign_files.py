"""Sound files that are none of ours: their kind is said, or their tensors are taken, whatever names they have."""

import gzip
import io
import pickle
import re

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from ldm_lab import LDMPipeline, UNet2DModel, VQModel
from ldm_lab.checkpoints import checkpoint
from ldm_lab.checkpoints.compvis import is_checkpoint
from ldm_lab.checkpoints.locate import find
from ldm_lab.checkpoints.state_dicts import tensors_in, unwrapped
from ldm_lab.data.images import FolderImages, ImageError
from ldm_lab.data.storage.archives import open_root
from ldm_lab.losses.perceptual import LPIPS
from ldm_lab.metrics.extractors import read_again
from ldm_lab.metrics.images import open_array
from ldm_lab.metrics.reference import names
from ldm_lab.models.autoencoders import load_autoencoder
from ldm_lab.tools.evaluate.autoencoder import perceptual
from ldm_lab.utils.reading import LoadError, read_torch, read_yaml
from tests.checkpoints.test_compvis_checkpoint import IO, STATE, original_config
from tests.data.pictures import save
from tests.helpers import assert_close_relative
from tests.security import sources

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 123456\n"
ADVICE = "a Git LFS pointer in the place of the file itself: run git lfs pull"


def refusal(act, *arguments):
    with pytest.raises(ValueError) as error:
        act(*arguments)
    assert str(error.value).isprintable()
    return str(error.value)


# Files of another kind.


def array(write):
    buffer = io.BytesIO()
    write(buffer, np.zeros((2, 3)))
    return buffer.getvalue()


READERS = (find, LDMPipeline.from_single_file, load_autoencoder, VQModel.from_single_file)
KINDS = {
    "Git LFS": (POINTER.encode(), ADVICE),
    ".npy": (array(np.save), "an array of NumPy (.npy)"),
    ".npz": (array(np.savez), "an archive of NumPy's arrays (.npz)"),
    "gzip": (gzip.compress(b"x" * 1000), "a file compressed with gzip: unpack it first"),
    "HTML": (b"<!DOCTYPE html>\n<html><title>Log in</title></html>", "a page of HTML or XML"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(100), "a file of HDF5"),
    "JSON": (b'{"_class_name": "UNet2DModel"}', "text (JSON)"),
}


@pytest.mark.parametrize(("content", "said"), KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("use", READERS)
def test_a_checkpoint_of_another_kind(tmp_path, content, said, use):
    (tmp_path / "model.ckpt").write_bytes(content)
    line = refusal(use, tmp_path / "model.ckpt")
    assert line.startswith(f"{tmp_path}/model.ckpt: this is {said}")
    assert "damaged" not in line


def test_numpys_own_pickles_are_not_called_damaged(tmp_path):
    with open(tmp_path / "model.ckpt", "wb") as file:
        pickle.dump({"conv.weight": np.zeros(3)}, file)
    assert "damaged, or no file of torch" in refusal(find, tmp_path / "model.ckpt")
    torch.save({"args": np.float64(1), "state_dict": STATE}, tmp_path / "model.ckpt")
    line = refusal(find, tmp_path / "model.ckpt")
    assert "holds more than tensors and plain data, which could run code and is not loaded (" in line
    assert line.endswith(" such): save its state_dict alone, where you trust it")
    assert "damaged" not in line


@pytest.mark.parametrize("path", ["model_index.json", *sources.CONFIGS.values(), sources.WEIGHTS, sources.BIN])
def test_a_pointer_in_a_folder(tmp_path, path):
    folder = sources.pipeline(tmp_path)
    if path == sources.BIN:
        (folder / sources.WEIGHTS).unlink()
    (folder / path).write_text(POINTER)
    line = refusal(LDMPipeline.from_pretrained, folder)
    assert line.startswith(f"{folder / path}: ")
    assert ADVICE in line


def test_a_pointer_elsewhere(tmp_path):
    path = tmp_path / "pointer"
    path.write_text(POINTER)
    lpips = lambda path: LPIPS(path).setup()  # noqa: E731
    evaluated = lambda path: perceptual(str(path))  # noqa: E731
    arrays = lambda path: open_array(path, "mu")  # noqa: E731
    for read in (read_yaml, read_torch, read_again, lpips, evaluated, arrays, names, open_root):
        assert ADVICE in refusal(read, path)


def test_a_pointer_among_pictures(tmp_path):
    for n in range(3):
        save(tmp_path / f"{n}.png")
    images = FolderImages(tmp_path, "train", 8)
    images.path(0).write_text(POINTER)
    with pytest.raises(ImageError, match=rf"\.png: {re.escape(ADVICE)}; expected JPEG, PNG"):
        images[0]


# State dicts.


def wrapped(state, *places):
    for place in places:
        state = {place: state, "epoch": 3, "optimizer": {"state": {}}}
    return state


def prefixed(state, how):
    """Names as wrappers make them: in front, behind the first part, between the two last."""
    make = {
        "module.": lambda key: f"module.{key}",
        "_orig_mod.": lambda key: f"_orig_mod.{key}",
        "both": lambda key: f"_orig_mod.module.{key}",
        "first": lambda key: key.replace(".", "._orig_mod.", 1),
        "last": lambda key: "._orig_mod.".join(key.rsplit(".", 1)),
    }[how]
    return {make(key): value for key, value in state.items()}


HOW = ("module.", "_orig_mod.", "both", "first", "last")
PLACES = [(), ("state_dict",), ("model",), ("ema",), ("params_ema",), ("state_dict", "model")]


@pytest.mark.parametrize("places", PLACES, ids=str)
@pytest.mark.parametrize("kind", ["torch", "safetensors", "before 1.6"])
def test_compvis_tensors_are_found_wherever_they_lie(tmp_path, beside, places, kind):
    path = tmp_path / f"model.{'safetensors' if kind == 'safetensors' else 'ckpt'}"
    if kind == "safetensors":
        if places:
            pytest.skip("holds tensors alone")
        save_file({key: value.contiguous() for key, value in STATE.items()}, path)
    else:
        torch.save(wrapped(STATE, *places), path, _use_new_zipfile_serialization=kind == "torch")
    assert is_checkpoint(path)
    assert find(path).images_seen is None
    with torch.no_grad():
        pipe = LDMPipeline.from_pretrained(path)
        assert_close_relative(pipe.unet(IO["in.unet_x"], IO["in.unet_t"]).sample, IO["unet_ema"])
    assert load_autoencoder(path).num_parameters() == pipe.vqvae.num_parameters()


@pytest.mark.parametrize("how", HOW)
def test_prefixes_in_a_file_of_compvis(tmp_path, beside, how):
    torch.save({"state_dict": prefixed(STATE, how)}, tmp_path / "model.ckpt")
    with torch.no_grad():
        pipe = LDMPipeline.from_pretrained(tmp_path / "model.ckpt")
        assert_close_relative(pipe.unet(IO["in.unet_x"], IO["in.unet_t"]).sample, IO["unet_ema"])


def test_an_average_of_compiled_weights(tmp_path, beside):
    """Its names have lost their dots."""
    start = "model_ema.diffusion_model"
    state = {key.replace(start, f"{start}_orig_mod"): value for key, value in STATE.items()}
    torch.save({"state_dict": prefixed(state, "first")}, tmp_path / "model.ckpt")
    pipe = LDMPipeline.from_pretrained(tmp_path / "model.ckpt")
    assert_close_relative(pipe.unet(IO["in.unet_x"], IO["in.unet_t"]).sample.detach(), IO["unet_ema"])


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("part", ["unet", "vqvae"])
@pytest.mark.parametrize("pickled", [False, True])
def test_prefixes_in_a_folder(tmp_path, how, part, pickled):
    folder = sources.pipeline(tmp_path)
    path = folder / part / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    if pickled:
        path.unlink()
        torch.save(prefixed(tensors, how), path.with_suffix(".bin"))
    else:
        save_file(prefixed(tensors, how), path)
    found = getattr(LDMPipeline.from_pretrained(folder), part).state_dict()
    assert all(torch.equal(found[key], value) for key, value in tensors.items())


@pytest.mark.parametrize("how", HOW)
def test_prefixes_in_our_checkpoints(tmp_path, how):
    state = sources.training_state()
    plain = LDMPipeline.from_pretrained(sources.FOLDER).unet.state_dict()
    torch.save({**state, "state_dict": prefixed(state["state_dict"], how)}, tmp_path / "last.ckpt")
    found = LDMPipeline.from_pretrained(tmp_path / "last.ckpt").unet.state_dict()
    assert all(torch.equal(found[key], value) for key, value in plain.items())


def test_a_network_may_have_a_part_of_that_name():
    state = {"module.weight": torch.zeros(1), "module._orig_mod.bias": torch.ones(1)}
    assert unwrapped(state, {"module.weight", "module.bias"}).keys() == {"module.weight", "bias"}
    assert unwrapped(state).keys() == {"weight", "bias"}
    with pytest.raises(LoadError, match="holds 'weight' twice"):
        unwrapped({"weight": torch.zeros(1), "module.weight": torch.zeros(1)})


NOTHING = ({}, [], {"a": 1}, {"state_dict": {}}, {"model": {"ema": {"net": {"x": {}}}}}, {1: torch.ones(1)})


@pytest.mark.parametrize("content", NOTHING, ids=str)
def test_what_holds_no_tensors_by_name(content):
    assert tensors_in(content) is None


BARE = [("model.ckpt", ()), ("model.pt", ("model",)), ("model.safetensors", ()), ("old.ckpt", ("ema",))]


@pytest.mark.parametrize(("name", "places"), BARE)
def test_a_bare_state_dict_says_what_is_missing(tmp_path, name, places):
    state, path = UNet2DModel.from_pretrained(sources.FOLDER / "unet").state_dict(), tmp_path / name
    if name.endswith("safetensors"):
        save_file({key: value.contiguous() for key, value in state.items()}, path)
    else:
        torch.save(wrapped(state, *places), path, _use_new_zipfile_serialization=not name.startswith("old"))
    weights = "diffusion_pytorch_model." + ("safetensors" if name.endswith("safetensors") else "bin")
    for use in (find, load_autoencoder, checkpoint.load):
        line = refusal(use, path)
        start = f"{path}: not a training checkpoint of ldm_lab, but a state dict ({len(state)} tensors, such as '"
        assert line.startswith(start)
        assert f"no config of its network: put it as {weights} beside that config.json, and name the folder" in line
        assert "original_config=" in line


def test_the_weights_in_a_folder_name_the_folder(tmp_path):
    folder = sources.pipeline(tmp_path)
    line = refusal(find, folder / "unet/diffusion_pytorch_model.safetensors")
    assert "but the weights of one network: name their folder, or that of the whole pipeline" in line
    weights = folder / "vqvae/diffusion_pytorch_model.safetensors"
    found, key = load_autoencoder(weights), "encoder.conv_in.weight"
    assert torch.equal(found.state_dict()[key], load_file(weights)[key])


@pytest.fixture
def beside(tmp_path):
    """The YAML file of the original, where it is found by itself."""
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(original_config()))


def test_an_original_config_does_for_bare_tensors(tmp_path):
    torch.save(STATE, tmp_path / "bare.pt")
    (tmp_path / "project.yaml").write_text(yaml.safe_dump(original_config()))
    pipe = LDMPipeline.from_single_file(tmp_path / "bare.pt", tmp_path / "project.yaml")
    assert pipe.scheduler.config.beta_end == pytest.approx(0.0195)

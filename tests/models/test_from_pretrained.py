"""The arguments of `from_pretrained` and `save_pretrained` that users of diffusers type: networks and pipelines."""

import json
import logging
import shutil

import numpy as np
import pytest
import torch

from ldm_lab import DDIMScheduler, DDPMScheduler, LDMPipeline, UNet2DModel, VQModel
from ldm_lab.utils.reading import LoadError
from ldm_lab.utils.terminal import said_once
from tests.helpers import GOLDEN
from tests.models.weights import assert_equal_weights

TINY = GOLDEN / "diffusers/ldm_tiny"


def load(folder=TINY, kind=LDMPipeline, **options):
    pipe = kind.from_pretrained(folder, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe):
    return pipe(2, torch.Generator().manual_seed(3), num_inference_steps=3, output_type="np").images


def edit(path, **changes):
    value = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: entry for key, entry in value.items() if entry is not ...}))


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(TINY, tmp_path / "pipeline")


@pytest.fixture
def said(caplog):
    said_once.clear()
    caplog.set_level(logging.WARNING)
    return lambda: caplog.messages


@pytest.fixture(scope="module")
def theirs():
    return pytest.importorskip("diffusers").LDMPipeline


# Types.


@pytest.mark.parametrize("value", [torch.float16, "float16", "torch.float16", "half"])
@pytest.mark.parametrize("key", ["torch_dtype", "dtype"])
def test_a_type_by_its_name(key, value):
    network = UNet2DModel.from_pretrained(TINY, subfolder="unet", **{key: value})
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float16}
    pipe = load(**{key: value})
    assert (pipe.unet.dtype, pipe.vqvae.dtype) == (torch.float16, torch.float16)


@pytest.mark.parametrize("value", [None, "auto"])
def test_the_type_of_the_file(value, tmp_path):
    load(torch_dtype="bfloat16").save_pretrained(tmp_path)
    assert load(tmp_path, torch_dtype=value).dtype == torch.bfloat16
    assert VQModel.from_pretrained(tmp_path, "vqvae", value).dtype == torch.bfloat16


@pytest.mark.parametrize("value", ["fp17", torch.int64, "nn", "int8", {"unet": torch.float16}, torch.float8_e4m3fn, 16])
def test_what_is_no_type_of_networks(value):
    for build in (lambda: load(torch_dtype=value), lambda: VQModel.from_pretrained(TINY, "vqvae", torch_dtype=value)):
        with pytest.raises(
            ValueError, match=r"^torch_dtype=.*: give one of float16, bfloat16, float32, float64 or auto$"
        ):
            build()


# Devices.


@pytest.mark.parametrize("value", ["cpu", torch.device("cpu"), {"": "cpu"}, "auto", "balanced", "sequential"])
def test_devices_that_hold_everything(value, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)
    for low_cpu_mem_usage in (True, False):
        options = {"device_map": value, "low_cpu_mem_usage": low_cpu_mem_usage}
        assert UNet2DModel.from_pretrained(TINY, subfolder="unet", **options).device.type == "cpu"
        assert load(**options).device.type == "cpu"


def test_a_device_map_moves_what_is_loaded(monkeypatch):
    """The meta device is there on every machine."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("meta"))
    assert UNet2DModel.from_pretrained(TINY, subfolder="unet", device_map="auto").device.type == "meta"
    pipe = load(device_map={"": "meta"})
    assert {pipe.unet.device.type, pipe.vqvae.device.type} == {"meta"}


@pytest.mark.parametrize(
    "value", [{"unet": "cpu", "vqvae": "cpu"}, {"": "disk"}, "disk", "nonsense", -1, {}, 1.5, "cuda:77"]
)
def test_devices_that_do_not(value):
    for build in (lambda: load(device_map=value), lambda: VQModel.from_pretrained(TINY, "vqvae", device_map=value)):
        with pytest.raises(ValueError, match=r"^device_map=.*: give one device for all, such as 'cuda'") as error:
            build()
        assert "\n" not in str(error.value)


# Variants and formats of a pipeline.

FORMS = {
    "variant": {"variant": "fp16"},
    "shards": {"max_shard_size": "40KB"},
    "shards of a variant": {"max_shard_size": 40_000, "variant": "fp16"},
    "pickled": {"safe_serialization": False},
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_pipelines_go_there_and_back_through_diffusers(form, theirs, tmp_path):
    ours, choice = load(), {"variant": form.get("variant"), "use_safetensors": form.get("safe_serialization", True)}
    ours.save_pretrained(tmp_path / "ours", **form)
    other = load(tmp_path / "ours", theirs, **choice)
    np.testing.assert_allclose(draw(other), draw(ours), atol=1e-4, rtol=0)
    other.save_pretrained(tmp_path / "theirs", **form)
    for folder in (tmp_path / "ours", tmp_path / "theirs"):
        assert np.array_equal(draw(load(folder, **choice)), draw(ours))


def test_a_network_without_the_variant_is_taken_as_it_is(folder, said):
    other = UNet2DModel.from_pretrained(folder, "unet")
    with torch.no_grad():
        other.conv_out.bias += 1
    other.save_pretrained(folder / "unet", variant="ema")
    pipe = load(folder, variant="ema")
    assert_equal_weights(pipe.unet, other)
    assert_equal_weights(pipe.vqvae, load(folder).vqvae)
    assert said() == [f"{folder / 'vqvae'}: has no weights of variant='ema': the plain ones are taken"]
    with pytest.raises(LoadError, match=r"pipeline: no weights of variant='fp16'; variants that are there: \['ema'\]$"):
        load(folder, variant="fp16")


def test_a_pipeline_of_one_variant_needs_no_argument(tmp_path, said):
    pipe = load()
    pipe.save_pretrained(tmp_path, variant="fp16")
    assert np.array_equal(draw(load(tmp_path)), draw(pipe))
    assert len(said()) == 2
    assert all("which are taken" in line for line in said())


# Parts in place.


def test_a_part_that_is_given_is_not_read(folder):
    whole = load(folder)
    for name in ("unet", "vqvae", "scheduler"):
        shutil.move(folder / name, folder / f"{name}.away")
        pipe = load(folder, **{name: getattr(whole, name)})
        assert getattr(pipe, name) is getattr(whole, name)
        assert np.array_equal(draw(pipe), draw(whole))
        shutil.move(folder / f"{name}.away", folder / name)
    scheduler = DDPMScheduler.from_config(whole.scheduler.config)
    edit(folder / "model_index.json", scheduler=["diffusers", "NoSuchScheduler"])
    assert load(folder, scheduler=scheduler).scheduler is scheduler


def test_a_given_part_must_fit(folder):
    with torch.device("meta"):
        unet = UNet2DModel.from_config(load().unet.config, in_channels=5)
    with pytest.raises(ValueError, match="in_channels=5 and out_channels=3"):
        load(folder, unet=unet)


def test_arguments_of_the_constructor_replace_the_config():
    network = VQModel.from_pretrained(TINY, subfolder="vqvae", scaling_factor=0.5)
    assert network.config.scaling_factor == 0.5
    for kind, place in ((VQModel, "vqvae"), (UNet2DModel, "unet")):
        with pytest.raises(TypeError, match=rf"^{kind.__name__} has no argument \['proxies'\]; it has "):
            kind.from_pretrained(TINY, subfolder=place, proxies=None)


# Configs.


@pytest.mark.parametrize("value", [{"new_option": None}, {"torch_dtype": "float16", "auto_map": {"a": "b"}}])
def test_keys_that_change_nothing_are_left_out(value, folder, said):
    edit(folder / "unet/config.json", **value)
    assert_equal_weights(load(folder).unet, load().unet)
    assert said() == [f"the config of this UNet2DModel has keys that change nothing and are left out: {sorted(value)}"]


@pytest.mark.parametrize("value", [False, 0, "", [], {"bits": 4}])
def test_keys_that_may_change_something_are_refused(value, folder):
    edit(folder / "unet/config.json", quantization_config=value, other=None)
    with pytest.raises(LoadError, match=r"config.json: .* keys that it does not know: \['quantization_config'\]$"):
        load(folder)


def test_a_pipeline_of_2022(folder):
    edit(folder / "model_index.json", _class_name="LatentDiffusionUncondPipeline", _diffusers_version="0.1.2")
    assert np.array_equal(draw(load(folder)), draw(load()))


def test_a_network_is_looked_for_in_the_folder_of_a_pipeline():
    with pytest.raises(LoadError, match=r"config.json: no such file; give subfolder= one of unet, vqvae$"):
        UNet2DModel.from_pretrained(TINY)
    with pytest.raises(LoadError, match=r"scheduler_config.json: no such file; give subfolder= one of scheduler$"):
        DDIMScheduler.from_pretrained(TINY)


def test_options_of_folders_are_not_for_checkpoints(tmp_path):
    path = GOLDEN / "compvis/model.ckpt"
    for options in ({"variant": "fp16"}, {"use_safetensors": True}):
        with pytest.raises(LoadError, match="are for folders, and this is a checkpoint"):
            load(path, **options)
    single = [kind.from_single_file(path, torch_dtype="float16") for kind in (VQModel, LDMPipeline)]
    assert [each.dtype for each in single] == [torch.float16] * 2
    scheduler = DDIMScheduler()
    assert load(path, scheduler=scheduler).scheduler is scheduler

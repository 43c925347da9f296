"""Files of weights: shards, variants, formats. They are those of diffusers, and come whole or not at all."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm_lab import AutoencoderKL, UNet2DModel, VQModel
from ldm_lab.utils import weights
from ldm_lab.utils.reading import LoadError
from ldm_lab.utils.terminal import said_once
from ldm_lab.utils.writing import SaveError
from tests.helpers import GOLDEN
from tests.models.weights import assert_equal_weights

TINY = GOLDEN / "diffusers/ldm_tiny"
INDEX = "diffusion_pytorch_model.safetensors.index.json"
SHARD = "diffusion_pytorch_model-{:05}-of-{:05}.safetensors".format
FORMS = {
    "plain": {},
    "variant": {"variant": "fp16"},
    "shards": {"max_shard_size": "40KB"},
    "shards of a variant": {"max_shard_size": 40_000, "variant": "non_ema"},
    "pickled": {"safe_serialization": False},
    "pickled shards": {"safe_serialization": False, "max_shard_size": "0.04 MB"},
    "pickled variant": {"safe_serialization": False, "variant": "fp16"},
}


def model(seed=0, kind=VQModel, **arguments):
    torch.manual_seed(seed)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    return kind(block_out_channels=[8, 16], norm_num_groups=4, **blocks, **arguments).eval()


def names(folder):
    return {path.name for path in folder.iterdir()}


def refusal(folder, **options):
    with pytest.raises(LoadError) as error:
        VQModel.from_pretrained(folder, **options)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(str(folder))
    return str(error.value)


@pytest.fixture
def said(caplog):
    said_once.clear()
    caplog.set_level(logging.WARNING)
    return lambda: caplog.messages


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_there_and_back(form, tmp_path, said):
    network = model()
    network.save_pretrained(tmp_path, **form)
    assert_equal_weights(VQModel.from_pretrained(tmp_path, variant=form.get("variant")), network)
    assert not said()


def test_shards_are_as_large_as_they_may_be(tmp_path):
    network = model()
    network.save_pretrained(tmp_path, max_shard_size="40KB")
    index = json.loads((tmp_path / INDEX).read_text())
    count = len(set(index["weight_map"].values()))
    assert count > 1
    assert names(tmp_path) == {"config.json", INDEX, *(SHARD(number, count) for number in range(1, count + 1))}
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in network.state_dict().values())
    held = {name: load_file(tmp_path / name) for name in set(index["weight_map"].values())}
    assert all(tensor in held[name] for tensor, name in index["weight_map"].items())
    sizes = [sum(value.nbytes for value in part.values()) for part in held.values()]
    assert max(sizes) <= 40_000 or max(len(part) for part in held.values()) == 1
    assert sum(sizes[:2]) > 40_000


@pytest.mark.parametrize(
    ("size", "number"),
    [(5, 5), ("5", 5), ("5GB", 5 * 10**9), ("200KB", 200_000), ("1.5 MB", 1_500_000), ("2KiB", 2048), ("1 mib", 2**20)],
)
def test_sizes(size, number):
    assert weights._bytes(size) == number


@pytest.mark.parametrize("size", [0, -1, "0KB", "ten", "5XB", "", True, None, [1], float("nan"), "KB"])
def test_what_is_no_size(size, tmp_path):
    if size is None:
        model().save_pretrained(tmp_path, max_shard_size=None)  # the default
        return
    with pytest.raises(ValueError, match=r"^max_shard_size=.*: give a number of bytes, or a text such as"):
        model().save_pretrained(tmp_path, max_shard_size=size)


@pytest.mark.parametrize("variant", ["../x", "a/b", "fp 16", "", "a.b", 3.5])
def test_what_is_no_variant(variant, tmp_path):
    with pytest.raises(ValueError, match=r"^variant=.*: give a word such as 'fp16'"):
        model().save_pretrained(tmp_path, variant=variant)


# Saved twice.


@pytest.mark.parametrize("second", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("first", FORMS.values(), ids=FORMS)
def test_of_two_savings_the_second_is_read(first, second, tmp_path):
    before, after = model(0), model(1)
    before.save_pretrained(tmp_path, **first)
    left = names(tmp_path)
    after.save_pretrained(tmp_path, **second)
    assert_equal_weights(VQModel.from_pretrained(tmp_path, variant=second.get("variant")), after)
    if first.get("variant") == second.get("variant"):
        after.save_pretrained(tmp_path / "alone", **second)
        assert names(tmp_path) - {"alone"} == names(tmp_path / "alone"), "files of the first saving are left"
    else:
        assert left < names(tmp_path)
        assert_equal_weights(VQModel.from_pretrained(tmp_path, variant=first.get("variant")), before)


@pytest.mark.parametrize("form", [{}, {"max_shard_size": "40KB"}])
@pytest.mark.parametrize("files", [1, 2])
def test_a_full_disk_leaves_the_shards_of_before(form, files, tmp_path, monkeypatch):
    model(0).save_pretrained(tmp_path, max_shard_size="40KB")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    written = []

    def fail_in_the_end(tensors, path, **options):
        written.append(path)
        save_file(tensors, path, **options)
        if len(written) == files or not form:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights, "save_file", fail_in_the_end)
    with pytest.raises(SaveError, match="No space left on device"):
        model(1).save_pretrained(tmp_path, **form)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_what_diffusers_leaves_beside_is_not_read(tmp_path):
    """It removes the shards of before, but not their index."""
    network = model()
    network.save_pretrained(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"encoder.conv_in.weight": SHARD(1, 2)}}))
    assert_equal_weights(VQModel.from_pretrained(tmp_path), network)
    (tmp_path / SHARD(1, 2)).write_bytes(b"")
    assert "cannot be read" in refusal(tmp_path)


# Which weights are taken.


def test_the_only_variant_is_taken_with_a_line(tmp_path, said):
    network = model()
    network.save_pretrained(tmp_path, variant="fp16")
    assert_equal_weights(VQModel.from_pretrained(tmp_path), network)
    assert said() == [
        f"{tmp_path}: holds no other weights than those of diffusion_pytorch_model.fp16.safetensors, which are taken"
    ]
    network.save_pretrained(tmp_path, variant="ema")
    assert refusal(tmp_path).endswith("is there: give variant='ema' or give variant='fp16'")


def test_another_variant_is_refused_with_those_there_are(tmp_path):
    model().save_pretrained(tmp_path)
    assert refusal(tmp_path, variant="fp16").endswith("fp16.bin is there: leave variant= out")
    model().save_pretrained(tmp_path, variant="ema")
    assert refusal(tmp_path, variant="fp16").endswith("is there: leave variant= out or give variant='ema'")


def test_formats_can_be_demanded(tmp_path):
    safe, pickled = model(0), model(1)
    pickled.save_pretrained(tmp_path, safe_serialization=False)
    assert_equal_weights(VQModel.from_pretrained(tmp_path), pickled)
    assert refusal(tmp_path, use_safetensors=True).endswith(": no diffusion_pytorch_model.safetensors is there")
    save_file({key: value.contiguous() for key, value in safe.state_dict().items()}, tmp_path / weights.WEIGHTS)
    assert_equal_weights(VQModel.from_pretrained(tmp_path), safe)
    assert_equal_weights(VQModel.from_pretrained(tmp_path, use_safetensors=True), safe)
    assert_equal_weights(VQModel.from_pretrained(tmp_path, use_safetensors=False), pickled)
    (tmp_path / weights.LEGACY_WEIGHTS).unlink()
    assert refusal(tmp_path, use_safetensors=False).endswith(": no diffusion_pytorch_model.bin is there")


def test_an_older_name_of_shards_of_a_variant(tmp_path):
    network = model()
    network.save_pretrained(tmp_path, max_shard_size="40KB", variant="fp16")
    index = json.loads((tmp_path / "diffusion_pytorch_model.safetensors.index.fp16.json").read_text())
    (tmp_path / "diffusion_pytorch_model.safetensors.index.fp16.json").unlink()
    older = {}
    for name in set(index["weight_map"].values()):
        older[name] = name.replace(".fp16", "").replace(".safetensors", ".fp16.safetensors")
        (tmp_path / name).rename(tmp_path / older[name])
    index["weight_map"] = {key: older[name] for key, name in index["weight_map"].items()}
    (tmp_path / "diffusion_pytorch_model.safetensors.fp16.index.json").write_text(json.dumps(index))
    assert_equal_weights(VQModel.from_pretrained(tmp_path, variant="fp16"), network)
    network.save_pretrained(tmp_path, variant="fp16")
    assert names(tmp_path) == {"config.json", "diffusion_pytorch_model.fp16.safetensors"}


# Indices of strangers.


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "/etc/passwd", "..", "a/b.safetensors", "a\\b.safetensors", ".hidden.safetensors", "x.txt", "",
     f"{'x' * 400}.safetensors", "x\0.safetensors", 3, None, ["x.safetensors"], "\n.safetensors"],
)  # fmt: skip
def test_shards_lie_in_the_folder(name, tmp_path):
    model().save_pretrained(tmp_path, max_shard_size="40KB")
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"]["encoder.conv_in.weight"] = name
    (tmp_path / INDEX).write_text(json.dumps(index))
    assert "encoder.conv_in.weight lies in" in refusal(tmp_path)


@pytest.mark.parametrize("content", [{}, {"weight_map": {}}, {"weight_map": [1]}, {"weight_map": "x.safetensors"}])
def test_what_is_no_index(content, tmp_path):
    model().save_pretrained(tmp_path, max_shard_size="40KB")
    (tmp_path / INDEX).write_text(json.dumps(content))
    assert refusal(tmp_path) == f"{tmp_path / INDEX}: has no weight_map, which says in which file a tensor lies"


def test_a_missing_shard_is_named(tmp_path):
    model().save_pretrained(tmp_path, max_shard_size="40KB")
    first = min(name for name in names(tmp_path) if "-00001-" in name)
    (tmp_path / first).unlink()
    assert f"{INDEX}: {first} is not there (1 of " in refusal(tmp_path)


def test_an_index_that_is_of_another_saving(tmp_path):
    model().save_pretrained(tmp_path, max_shard_size="40KB")
    first = min(name for name in names(tmp_path) if "-00001-" in name)
    state = load_file(tmp_path / first)
    save_file({**state, "more": torch.zeros(1)}, tmp_path / first)
    assert refusal(tmp_path) == f"{tmp_path / first}: more lies here or in {INDEX}, but not in both"


# diffusers.


def networks():
    kl = model(1, AutoencoderKL)
    unet = UNet2DModel.from_pretrained(TINY, subfolder="unet")
    return {"VQModel": model(), "AutoencoderKL": kl, "UNet2DModel": unet}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("name", ["VQModel", "AutoencoderKL", "UNet2DModel"])
def test_diffusers_reads_ours_and_ours_reads_theirs(name, form, tmp_path):
    kind = getattr(pytest.importorskip("diffusers"), name)
    ours = networks()[name]
    ours.save_pretrained(tmp_path / "ours", **form)
    choice = {"variant": form.get("variant"), "use_safetensors": form.get("safe_serialization", True)}
    theirs = kind.from_pretrained(tmp_path / "ours", low_cpu_mem_usage=False, **choice)
    assert_equal_weights(theirs, ours)
    theirs.save_pretrained(tmp_path / "theirs", **form)
    assert_equal_weights(type(ours).from_pretrained(tmp_path / "theirs", **choice), ours)
    assert names(tmp_path / "ours") - names(tmp_path / "theirs") == set() or "shard" in str(form)

"""Files from strangers: weights, links, what lies in the folder of a run or beside a file of CompVis."""

import json
import os
import shutil
import struct

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from ldm_lab import LDMPipeline
from ldm_lab.checkpoints.locate import find
from ldm_lab.runs.folder import RunFolder
from ldm_lab.training.loggers.csv import MetricsCSV
from ldm_lab.training.loggers.wandb import WandbLogger
from ldm_lab.utils.reading import read_yaml
from ldm_lab.utils.writing import replacing
from tests.security import sources
from tests.security.guard import guarded, refusal


@pytest.fixture
def folder(tmp_path):
    return sources.pipeline(tmp_path)


@pytest.fixture
def load(tmp_path):
    """Loads a source; returns the line that this is refused with."""
    return lambda source: refusal(lambda: LDMPipeline.from_pretrained(source), tmp_path)


# Safetensors.


def header(**tensors):
    """`name=(dtype, shape, offsets)` as a header."""
    fields = ("dtype", "shape", "data_offsets")
    return json.dumps({name: dict(zip(fields, entry, strict=True)) for name, entry in tensors.items()}).encode()


ONE = '"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
SAFETENSORS = {
    "nothing": (None, b""),
    "a length alone": (8, b""),
    "length of 2^63": (2**63, b"{}"),
    "length of 2^40": (2**40, b"{}"),
    "length of all": (2**64 - 1, b"{}"),
    "length 0": (0, b"{}"),
    "a list": (2, b"[]"),
    "not UTF-8": (4, b"\xff\xfe\xff\xfe"),
    "deep": (10**5, b"[" * 10**5),
    "no JSON": (4, b"{{{{"),
    "negative shape": header(a=("F32", [-1], [0, 4])),
    "shape of 2^70 bytes": header(a=("F32", [2**35, 2**33], [0, 4])),
    "shape of 2^62": header(a=("F32", [2**62], [0, 4])),
    "nothing, but 2^63 wide": header(a=("F32", [0, 2**63], [0, 0])),
    "10,000 dimensions": header(a=("F32", [1] * 10_000, [0, 4])),
    "offsets beyond the end": header(a=("F32", [2**20], [0, 2**22])),
    "offsets turned round": header(a=("F32", [1], [4, 0])),
    "negative offsets": header(a=("F32", [1], [-4, 0])),
    "overlapping": header(a=("F32", [1], [0, 4]), b=("F32", [1], [0, 4])),
    "a hole": header(a=("F32", [1], [4, 8])),
    "same name twice": f"{{{ONE},{ONE}}}".encode(),
    "no dtype": b'{"a":{"shape":[1],"data_offsets":[0,4]}}',
    "dtype that is none": header(a=("os.system", [1], [0, 4])),
    "complex": header(a=("C64", [1], [0, 8])),
    "4 bits": header(a=("F4", [8], [0, 4])),
    "a name with ../": header(**{"../../../etc/passwd": ("F32", [1], [0, 4])}),
    "a name of 10^6": header(**{"x" * 10**6: ("F32", [1], [0, 4])}),
    "metadata of code": b'{"__metadata__":{"format":"os.system"},' + ONE.encode() + b"}",
}


@pytest.mark.parametrize("content", SAFETENSORS.values(), ids=SAFETENSORS)
def test_safetensors(folder, load, content):
    length, text = content if isinstance(content, tuple) else (len(content), content)
    prefix = b"" if length is None else struct.pack("<Q", length)
    (folder / sources.WEIGHTS).write_bytes(prefix + text + bytes(8))
    assert f"{folder}/unet" in load(folder)


SPOILED = {
    "NaN": lambda value: value * float("nan"),
    "infinity": lambda value: value / 0,
    "8 bits": lambda value: value.to(torch.float8_e4m3fn),
    "whole numbers": lambda value: value.long(),
    "complex": lambda value: value.to(torch.complex64),
    "another shape": lambda value: value[None],
}


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED)
def test_values_of_weights(folder, load, spoil):
    tensors = load_file(folder / sources.WEIGHTS)
    save_file({**tensors, "conv_in.weight": spoil(tensors["conv_in.weight"])}, folder / sources.WEIGHTS)
    assert "unet: conv_in.weight " in load(folder)


def test_weights_that_overflow_are_told_from_images(folder, tmp_path):
    tensors = load_file(folder / sources.WEIGHTS)
    save_file({**tensors, "conv_out.weight": tensors["conv_out.weight"] * 1e38}, folder / sources.WEIGHTS)
    pipe = LDMPipeline.from_pretrained(folder)
    pipe.vqvae.register_to_config(scaling_factor=1e-6)
    pipe.set_progress_bar_config(disable=True)
    assert "the images are not finite" in refusal(lambda: pipe(num_inference_steps=2), tmp_path)


def test_weights_of_several_types_are_computed_with(folder):
    tensors = load_file(folder / sources.WEIGHTS)
    save_file({**tensors, "conv_in.weight": tensors["conv_in.weight"].half()}, folder / sources.WEIGHTS)
    assert {parameter.dtype for parameter in LDMPipeline.from_pretrained(folder).unet.parameters()} == {torch.float32}


# Links, pipes and devices.


def place(path, kind):
    """Put something that is no file, or a link to a file elsewhere, in the place of a file."""
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to({"loop": path, "link to a pipe": path.parent / "pipe"}.get(kind, kind))
    if kind == "link to a pipe":
        os.mkfifo(path.parent / "pipe")


NO_FILES = ("pipe", "link to a pipe", "folder", "loop", "/dev/zero", "/dev/stdin", "/nowhere", "/etc/passwd")


@pytest.mark.parametrize("kind", NO_FILES)
@pytest.mark.parametrize("path", ["model_index.json", *sources.CONFIGS.values(), sources.WEIGHTS, sources.BIN])
def test_what_stands_in_the_place_of_a_file(folder, load, path, kind):
    if path == sources.BIN:
        (folder / sources.WEIGHTS).unlink()
    place(folder / path, kind)
    line = load(folder)
    assert "root:" not in line, "what lies elsewhere is shown"
    assert str(folder) in line


@pytest.mark.parametrize("kind", NO_FILES)
def test_a_checkpoint_that_is_no_file(tmp_path, load, kind):
    place(tmp_path / "last.ckpt", kind)
    assert str(tmp_path) in load(tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=str(tmp_path)):
        read_yaml(tmp_path / "last.ckpt")


def test_links_as_such_are_followed(folder, tmp_path):
    """In the cache of the Hugging Face hub every file is a link to another folder."""
    (tmp_path / "blobs").mkdir()
    for number, path in enumerate([path for path in folder.rglob("*") if path.is_file()]):
        blob = tmp_path / "blobs" / str(number)
        shutil.move(path, blob)
        path.symlink_to(os.path.relpath(blob, path.parent))
    (tmp_path / "linked").symlink_to(folder)
    assert LDMPipeline.from_pretrained(tmp_path / "linked").unet.num_parameters()


@pytest.mark.parametrize("entry", ["../../vqvae", "/etc", "vqvae/../../x"])
def test_names_of_components_are_no_paths(folder, entry):
    """The index says which classes there are, never where: further entries are nobody's business."""
    sources.edit(folder / "model_index.json", **{entry: ["os", "system"]})
    assert guarded(lambda: LDMPipeline.from_pretrained(folder).components.keys(), folder).text == (
        "dict_keys(['vqvae', 'unet', 'scheduler'])"
    )


def test_a_link_does_not_carry_what_is_written_elsewhere(tmp_path):
    outside, target = tmp_path / "outside", tmp_path / "file"
    target.symlink_to(outside)
    (tmp_path / f".file.{os.getpid()}.tmp").symlink_to(outside)
    with replacing(target) as temporary:
        temporary.write_text("mine")
    assert target.read_text() == "mine"
    assert not outside.exists()


# The folder of a run.


@pytest.fixture
def stage(tmp_path):
    return sources.run_folder(tmp_path)


def test_a_run_that_is_well(stage):
    assert RunFolder(stage).started_with()["max_images"] == 64
    assert find(stage.parent).images_seen == 8
    assert WandbLogger(stage, "project", "group", "diffusion").version == "0123456789ab"
    assert list(MetricsCSV(stage).experiment) == [8, 16]


LAUGHS = "a: &a [x,x,x,x]\nb: &b [*a,*a,*a]\nmax_images: 64"
RUN_CONFIGS = {
    "a reference": "max_images: 64\nmodel: {name: '${oc.env:HOME}'}",
    "a nested reference": "max_images: 64\nmodel: {names: [[{a: '${oc.decode:x}'}]]}",
    "aliases": LAUGHS,
    "code": "!!python/object/apply:os.system ['true']",
    "no length": "model: {}",
    "length of text": "max_images: '64'",
    "a list": "[1, 2]",
    "nothing": "",
    "keys that are paths": "max_images: 64\n'model[0].x': 1",
    "keys with dots alone": "max_images: 64\nmodel: {'..': 1}",
    "binary": "\0\1\2",
    "deep": "max_images: 64\na: " + "[" * 900 + "]" * 900,
}


@pytest.mark.parametrize("content", RUN_CONFIGS.values(), ids=RUN_CONFIGS)
def test_the_config_of_a_run(stage, content):
    (stage / "config.yaml").write_text(content)
    assert refusal(lambda: RunFolder(stage).started_with(), stage).startswith(f"{stage}/config.yaml: ")


@pytest.mark.parametrize("content", ["[]", "{", '{"finished": ' + "[" * 2000, '{"finished": 1, "finished": 0}', "\0"])
def test_the_status_of_a_run(stage, content):
    (stage / "status.json").write_text(content)
    for act in (lambda: RunFolder(stage).status(), lambda: find(stage.parent)):
        assert refusal(act, stage).startswith(f"{stage}/status.json: ")


IDS = ("../../x", "/etc/passwd", "a b", "a\nb", "", "x" * 10**6, "\0", "a?b#c", "é", "${x}")


@pytest.mark.parametrize("content", IDS, ids=range(len(IDS)))
def test_the_id_of_a_wandb_run(stage, content):
    """It becomes part of the names of files and addresses: what is none makes place for a new one."""
    (stage / "wandb_id").write_text(content)
    outcome = guarded(lambda: WandbLogger(stage, "project", "group", "diffusion").version, stage)
    assert outcome.trespasses == []
    assert outcome.text.isalnum()
    assert len(outcome.text) == 12
    assert outcome.text == (stage / "wandb_id").read_text()


def test_a_pipe_is_not_waited_for_as_the_id_of_a_wandb_run(stage):
    place(stage / "wandb_id", "pipe")
    assert guarded(lambda: WandbLogger(stage, "project", "group", "diffusion").version, stage).kind == "done"


def test_the_id_of_a_wandb_run_is_not_written_elsewhere(stage, tmp_path):
    place(stage / "wandb_id", tmp_path / "outside")
    assert WandbLogger(stage, "project", "group", "diffusion").version
    assert not (tmp_path / "outside").exists()


TABLES = (
    "a,b\n1,2\n",
    "images_seen\nmany\n",
    "images_seen\n1.5\n",
    "images_seen\n\xff\n",
    "images_seen,a\n1,2,3,4\n",
    f"images_seen\n{'9' * 10**4}\n",
    f"images_seen,a\n1,{'x' * 10**6}\n",
)


@pytest.mark.parametrize("content", TABLES, ids=range(len(TABLES)))
def test_the_metrics_of_a_run(stage, content):
    (stage / "metrics.csv").write_text(content, encoding="latin-1")
    assert refusal(lambda: MetricsCSV(stage).experiment, stage).startswith(f"{stage}/metrics.csv: ")


# A file of CompVis and its config.

OF_COMPVIS = {
    "model.params.unet_config.params": [
        {"num_res_blocks": 10**9}, {"num_res_blocks": True}, {"channel_mult": [1, 10**12]}, {"channel_mult": [1] * 99},
        {"image_size": 10**9}, {"model_channels": 10**12}, {"num_head_channels": "32"},
        {"dropout": 2}, {"os.system": "true"}, {"attention_resolutions": [True]}, {"attention_resolutions": "all"},
    ],
    "model.params.first_stage_config.params.ddconfig": [
        {"num_res_blocks": 10**9}, {"ch_mult": [10**12, 1]}, {"ch": 0}, {"resolution": 10**9}, {"z_channels": "3"},
    ],
    "model.params.first_stage_config.params": [{"n_embed": 10**12}, {"embed_dim": -1}, {"_target_": "os.system"}],
    "model.params.first_stage_config": [{"target": "os.system"}, {"target": "subprocess.Popen"}, {"params": []}],
    "model.params": [
        {"timesteps": 10**12}, {"timesteps": "1000"}, {"linear_start": float("nan")}, {"linear_end": "2"},
        {"beta_schedule": "eval"}, {"parameterization": ["eps"]}, {"cond_stage_config": {"target": "os.system"}},
    ],
    "model": [{"params": None}, {"params": [1]}],
}  # fmt: skip
SPOILED_CONFIGS = [(section, change) for section, changes in OF_COMPVIS.items() for change in changes]


@pytest.mark.parametrize(("section", "change"), SPOILED_CONFIGS, ids=[f"{s[13:]}-{c}" for s, c in SPOILED_CONFIGS])
def test_the_config_of_a_compvis_file(tmp_path, section, change):
    config, node = sources.compvis_config(), None
    for key in section.split("."):
        node = (config if node is None else node)[key]
    node.update(change)
    path = tmp_path / "project.yaml"
    path.write_text(yaml.safe_dump(config))
    line = refusal(lambda: LDMPipeline.from_single_file(sources.COMPVIS, path), tmp_path)
    assert line.startswith((f"{path}: ", f"{sources.COMPVIS}: "))


@pytest.mark.parametrize(
    ("name", "value"),
    [("scale_factor", value) for value in (float("nan"), 0.0, -1.0, float("inf"), 1e-30)]
    + [("betas", value) for value in (float("nan"), 0.0, 1.0, 2.0, -0.1, float("inf"))],
)
def test_the_numbers_of_a_compvis_file(tmp_path, load, name, value):
    state = sources.compvis_state()["state_dict"]
    torch.save({"state_dict": {**state, name: torch.full_like(state[name], value)}}, tmp_path / "model.ckpt")
    assert load(tmp_path / "model.ckpt").startswith(f"{tmp_path}/model.ckpt: ")

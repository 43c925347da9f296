"""The run folder: what counts as changed, as finished, as somebody else's; and which device is said."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

from ldm_lab.runs.changes import compare
from ldm_lab.runs.folder import RunFolder
from ldm_lab.training import device
from ldm_lab.training.run import first_stage, lengthened
from ldm_lab.training.schedules import ConstantWithWarmup, CosineWithWarmup
from ldm_lab.utils.errors import reporting
from ldm_lab.utils.nested import flatten
from ldm_lab.utils.reading import LoadError
from ldm_lab.utils.terminal import is_first_process

DATA = "ldm_lab.data.datamodule.ImageDataModule"
CONFIG = {
    "resume": "auto",
    "max_images": 64,
    "seed": 0,
    "data": {
        "image_size": [64, 32],
        "module": {"_target_": DATA, "num_workers": 0, "train_set": {"root": "/a", "num_train": 5}},
    },
    "model": {
        "optimizer": {"_target_": "torch.optim.Adam", "lr": 1e-3},
        "schedule": {"_target_": "a.Cosine", "max_images": 64, "warmup_images": 8},
        "autoencoder": {"dropout": 0.0},
    },
    "trainer": {"devices": 1, "gradient_clip_val": None},
    "callbacks": {},
    "autoencoder": "/runs/x",
}


def changed(config=CONFIG, **values):
    """The config with `a__b=value` instead of `a.b`."""
    config = yaml.safe_load(yaml.safe_dump(config))
    for key, value in values.items():
        *path, last = key.split("__")
        node = config
        for part in path:
            node = node[part]
        node[last] = value
    return config


@pytest.fixture
def folder(tmp_path):
    """A run folder in which something was trained."""
    run = RunFolder(tmp_path / "run/autoencoder")
    run.write_config(CONFIG)
    run.write_status(finished=True, stage="diffusion", max_images=64, autoencoder="abc", **{"val/loss": 0.5})
    run.last.parent.mkdir()
    run.last.touch()
    run.final.mkdir()
    return run


def test_flatten_names_every_leaf():
    assert flatten({"a": {"b": 1, "c": {}}, "d": [1, {"e": 2}]}) == {"a.b": 1, "a.c": {}, "d": [1, {"e": 2}]}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"seed": 1}, ["seed: 0 -> 1"]),
        ({"model__optimizer__lr": 2e-3}, ["model.optimizer.lr: 0.001 -> 0.002"]),
        ({"model__optimizer__betas": [0.5, 0.9]}, ["model.optimizer.betas: None -> [0.5, 0.9]"]),
        ({"data__image_size": 64}, ["data.image_size: [64, 32] -> 64"]),
        ({"data__module__train_set__num_train": 6}, ["data.module.train_set.num_train: 5 -> 6"]),
        ({"trainer__gradient_clip_val": 1.0}, ["trainer.gradient_clip_val: None -> 1.0"]),
        ({"model__schedule___target_": "a.Constant"}, ["model.schedule._target_: a.Cosine -> a.Constant"]),
        ({"model__schedule__warmup_images": 16}, ["model.schedule.warmup_images: 8 -> 16"]),
        ({"model__autoencoder__dropout": 0.1}, ["model.autoencoder.dropout: 0.0 -> 0.1"]),
        # what changes neither data, model nor objective
        ({"data__module__num_workers": 4, "data__module__train_set__root": "/b", "trainer__devices": 8}, []),
        ({"max_images": 128, "model__schedule__max_images": 128, "autoencoder": "/runs/y", "resume": "never"}, []),
        ({"callbacks__progress": {"_target_": "a.B"}}, []),
    ],
)
def test_differences_are_the_settings_that_matter(values, expected):
    assert compare(CONFIG, changed(**values)).changed == expected


# --- settings that one of two versions does not know

LOSS = {"_target_": "ldm_lab.losses.autoencoder.AutoencoderLoss", "perceptual_weight": 1.0}
OLD = changed(model__loss=LOSS)
COLOUR = {"_target_": "ldm_lab.losses.pixel.ColourMSE"}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"model__optimizer__weight_decay": 0}, []),  # as torch has it
        ({"model__optimizer__betas": [0.9, 0.999]}, []),
        ({"model__loss__discriminator": None}, []),
        ({"model__optimizer__weight_decay": 0.1}, ["model.optimizer.weight_decay: None -> 0.1"]),
        ({"model__loss__pixel": COLOUR}, [f"model.loss.pixel._target_: None -> {COLOUR['_target_']}"]),
        ({"trainer__gradient_clip_val": 1.0}, ["trainer.gradient_clip_val: None -> 1.0"]),
    ],
)
def test_a_key_that_was_not_there_stands_for_what_was_done_without_it(values, expected):
    """For the constructor's default, whatever today's YAML files say, and whoever has given the value."""
    old = changed(OLD)
    del old["trainer"]["gradient_clip_val"]
    old["trainer"]["_target_"] = "lightning.Trainer"
    new = changed(old, **values)
    for typed in ((), [key.replace("__", ".") for key in values]):
        changes = compare(old, new, typed)
        assert (changes.changed, changes.added, changes.dropped) == (expected, [], [])
    assert len(compare(new, old).changed) == len(expected)
    assert compare(new, old).dropped == []


@pytest.mark.parametrize("value", [1, None, {"_target_": "torch.nn.Identity"}])
@pytest.mark.parametrize("place", ["data__grain", "grain", "model__autoencoder__grain", "model__optimizer__grain"])
def test_a_key_that_no_constructor_knows_takes_its_default_and_is_named(place, value):
    new = changed(OLD, **{place: value})
    key, shown = next(item for item in flatten(new).items() if item[0] not in flatten(OLD))
    assert compare(OLD, new).added == compare(new, OLD).dropped == [f"{key}={shown}"]
    assert compare(OLD, new).changed == compare(new, OLD).changed == []
    assert compare(OLD, new, [key]).changed == [f"{key}: None -> {shown}"]  # what was typed is no default


def test_a_constructor_that_takes_any_key_may_make_something_of_it():
    old = changed(OLD, model__optimizer___target_="torch.nn.Identity")
    new = changed(old, model__optimizer__grain=1)
    assert compare(old, new).added == ["model.optimizer.grain=1"]
    assert compare(new, old).changed == ["model.optimizer.grain: 1 -> None"]


def test_what_another_version_did_not_know_is_said(folder):
    new = changed(seed=0)
    new["model"]["autoencoder"] = {"grain": 2}
    (line, other) = folder.check(new)
    start = f"{folder.folder} was written by another version: these settings"
    assert line == f"{start} are new, and have their defaults: model.autoencoder.grain=2"
    assert other == f"{start} no longer exist: model.autoencoder.dropout=0.0"
    assert folder.check(CONFIG) == []
    with pytest.raises(ValueError, match=r"other settings: model\.autoencoder\.grain: None -> 2\. Choose"):
        folder.check(new, typed={"model.autoencoder.grain"})


@pytest.mark.parametrize("found", [3, "2", None])
@pytest.mark.parametrize("name", ["config.yaml", "status.json"])
def test_what_a_newer_version_has_written_is_refused(folder, name, found):
    folder.check(CONFIG)
    path = folder.folder / name
    content = yaml.safe_load(path.read_text())  # JSON is YAML
    assert content["ldm_lab_format"] == 2
    path.write_text(json.dumps({**content, "ldm_lab_format": found}))
    message = rf"{name}: is of format {found}, this ldm_lab reads up to 2: update it"
    with pytest.raises(LoadError, match=message):
        folder.check(CONFIG) if name == "config.yaml" else folder.finished(64, "abc")
    del content["ldm_lab_format"]  # of before there was a number
    path.write_text(json.dumps(content))
    folder.check(CONFIG)
    assert folder.finished(64, "abc")


def test_a_folder_takes_its_own_settings_and_longer_runs(folder):
    folder.check(CONFIG)
    folder.check(changed(max_images=128))
    folder.check(changed(seed=1, resume="force"))


def test_many_changed_settings_have_a_line_each(folder, capsys):
    more = {f"model__optimizer__{name}": value for name, value in zip("abcdefghi", range(9), strict=True)}
    with pytest.raises(SystemExit) as end, reporting("testing"):
        folder.check(changed(seed=1, **more), typed=[f"model.optimizer.{name}" for name in "abcdefghi"])
    first, *rest = str(end.value).splitlines()
    assert "was started with 10 other settings, listed below. Choose another name=, or resume=force" in first
    assert rest == ["  seed: 0 -> 1", *[f"  model.optimizer.{name}: None -> {n}" for n, name in enumerate("abcdefghi")]]


# --- the images


def marks(train, val):
    return {"train": np.array(train, np.uint32), "val": np.array(val, np.uint32)}


def test_a_folder_knows_its_images_wherever_they_lie(folder):
    folder.check_marks(marks([1, 2, 3], [9]), "auto")  # nothing is known of it
    folder.write_marks(marks([1, 2, 3], [9]))
    folder.check_marks(marks([1, 2, 3], [9]), "auto")


@pytest.mark.parametrize(
    ("train", "val", "added", "missing"),
    [
        ([1, 2], [9], 0, 1),
        ([1, 2, 3, 4, 5], [9], 2, 0),
        ([1, 2, 4], [9], 1, 1),
        ([1, 2, 3, 9], [], 1, 1),
        ([2, 3, 3], [9], 1, 1),
    ],
)
def test_a_folder_refuses_other_images_with_their_number(folder, train, val, added, missing):
    folder.write_marks(marks([1, 2, 3], [9]))
    expected = f"other images: {added} added and {missing} missing of 4 .* Choose another name=, or resume=force"
    with pytest.raises(ValueError, match=expected):
        folder.check_marks(marks(train, val), "auto")
    folder.check_marks(marks(train, val), "force")
    shutil.rmtree(folder.last.parent)
    shutil.rmtree(folder.final)
    folder.check_marks(marks(train, val), "auto")  # a start that failed binds nobody


@pytest.mark.parametrize("damage", [b"", b"not an archive", b"PK\3\4 cut short"])
def test_a_damaged_list_of_images_is_named(folder, damage):
    (folder.folder / "data.npz").write_bytes(damage)
    with pytest.raises(LoadError, match=r"data\.npz: not readable .*resume=force takes the images as they are"):
        folder.check_marks(marks([1], [2]), "auto")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"seed": 1}, r"run/autoencoder was started with other settings: seed: 0 -> 1\. Choose another name="),
        ({"max_images": 32}, "max_images=32, but .* is made for 64"),
        ({"max_images": 32, "resume": "force"}, "max_images=32, but .* is made for 64"),
        ({"resume": "never"}, "resume=never, but .* is not empty"),
        ({"resume": "maybe"}, "resume=maybe: must be auto, never or force"),
    ],
)
def test_a_folder_refuses_others(folder, values, message):
    with pytest.raises(ValueError, match=message):
        folder.check(changed(**values))


def test_a_folder_without_a_state_takes_all_but_never(folder):
    shutil.rmtree(folder.last.parent)
    shutil.rmtree(folder.final)
    folder.check(changed(seed=1, max_images=8))
    assert folder.finished(64, "another") is None
    with pytest.raises(ValueError, match="not empty"):
        folder.check(changed(resume="never"))
    shutil.rmtree(folder.folder)
    folder.check(changed(resume="never"))


def test_finished_means_at_that_length_with_that_autoencoder_and_the_result_there(folder):
    assert folder.finished(64, "abc")["val/loss"] == 0.5
    assert folder.finished(128, "abc") is None
    with pytest.raises(ValueError, match=r"another autoencoder \(abc, now xyz\): choose another name=.*last\.ckpt"):
        folder.finished(64, "xyz")
    folder.write_status(finished=False, max_images=64, autoencoder="abc")
    assert folder.finished(64, "abc") is None
    folder.write_status(finished=True, max_images=64, autoencoder="abc")
    folder.final.rmdir()
    assert folder.finished(64, "abc") is None
    assert RunFolder(folder.folder / "nothing").finished(64, None) is None


def test_a_damaged_status_is_named(folder):
    (folder.folder / "status.json").write_text("{")
    with pytest.raises(LoadError, match=r"status\.json: not readable"):
        folder.finished(64, "abc")


def test_a_folder_knows_the_settings_of_what_was_trained_there(folder):
    assert folder.started_with() == CONFIG
    shutil.rmtree(folder.last.parent)
    shutil.rmtree(folder.final)
    assert folder.started_with() is None


COSINE, CONSTANT, RISING = CosineWithWarmup(0, 100), ConstantWithWarmup(), ConstantWithWarmup(150)


@pytest.mark.parametrize(
    ("old", "new", "images", "change"),
    [
        (COSINE, CosineWithWarmup(0, 200), 100, ", 0 here before, goes on at 0.0005 and ends at 0"),
        (COSINE, CosineWithWarmup(0, 200), 50, ", 0.0005 here before, goes on at 0.00085 and ends at 0"),
        (CONSTANT, CONSTANT, 100, " stays at 0.001"),
        (RISING, RISING, 75, ", 0.0005 here before, goes on at 0.0005 and ends at 0.001"),
        (lambda images_seen: 0.5, lambda images_seen: 0.5, 100, " stays at 0.0005"),
        # with resume=force
        (CONSTANT, CosineWithWarmup(0, 200), 100, ", 0.001 here before, goes on at 0.0005 and ends at 0"),
        (COSINE, CosineWithWarmup(0, 200, final=0.1), 100, ", 0 here before, goes on at 0.00055 and ends at 0.0001"),
        (None, CONSTANT, 100, ", goes on at 0.001 and ends at 0.001"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("old_rate", [1e-3, 4e-3])
def test_a_longer_run_says_what_the_learning_rate_will_do(old, new, images, change, old_rate):
    parameters = [{"params": [torch.nn.Parameter(torch.zeros(1))]}]
    module = SimpleNamespace(
        schedule=new,
        parameter_groups=lambda: parameters,
        make_optimizer=lambda groups: torch.optim.SGD(groups, lr=1e-3),
    )
    before = {"max_images": 100, "model": {"optimizer": {"lr": old_rate}}}
    line = lengthened(module, before, old, 200, images)
    if old_rate == 1e-3:
        assert line == f"max_images 100 -> 200: the learning rate{change}"
    elif old:
        assert f"the learning rate, {old_rate * old(images):.2g} here before, goes on at" in line


@pytest.mark.parametrize("source", [None, "", "/nowhere"])
def test_a_missing_autoencoder_comes_with_the_command(source):
    with pytest.raises(LoadError, match=f"autoencoder={source} is not there; make it with: do this"):
        first_stage(source, "do this")


@pytest.mark.parametrize("variable", ["RANK", "LOCAL_RANK", "SLURM_PROCID"])
def test_the_first_process_is_known_before_any_group_exists(monkeypatch, variable):
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    assert is_first_process()
    for value, first in (("0", True), ("", True), ("1", False)):
        monkeypatch.setenv(variable, value)
        assert is_first_process() is first


# --- the device


def machine(monkeypatch, gpu=False, gpu_bf16=False, cpu_bf16=False, amx=False, card=False, cuda_build="13.0"):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: gpu_bf16)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)  # see tests/rehearsal/test_macs.py
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: cpu_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.version, "cuda", cuda_build)
    monkeypatch.setattr(device.shutil, "which", lambda name: "/usr/bin/nvidia-smi" if card else None)


@pytest.mark.parametrize(
    ("has", "accelerator", "expected"),
    [
        ({"gpu": True, "gpu_bf16": True}, "auto", "bf16-mixed"),
        ({"gpu": True, "gpu_bf16": False, "cpu_bf16": True}, "auto", "32-true"),
        ({"gpu": True, "gpu_bf16": True}, "cpu", "32-true"),
        ({"cpu_bf16": True}, "auto", "bf16-mixed"),
        ({"amx": True}, "cpu", "bf16-mixed"),
        ({}, "auto", "32-true"),
    ],
)
def test_precision_follows_the_device(monkeypatch, has, accelerator, expected):
    machine(monkeypatch, **has)
    assert device.resolve_precision("auto", accelerator) == expected
    assert device.resolve_precision("16-mixed", accelerator) == "16-mixed"
    assert [device.resolve_precision(short, accelerator) for short in (32, 16, "bf16", None)] == [
        "32-true", "16-mixed", "bf16-mixed", "32-true",
    ]  # fmt: skip


def trainer(kind="cpu"):
    return SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device(kind)), world_size=2, precision="32-true")


def test_the_device_is_said(monkeypatch):
    machine(monkeypatch)
    assert device.describe(trainer()) == f"2 x {torch.get_num_threads()} CPU threads, 32-true"
    machine(monkeypatch, gpu=True, card=True)
    assert device.describe(trainer("cuda")) == "2 x NVIDIA A100, 32-true"
    assert device.describe(trainer("mps")) == "2 x mps, 32-true"


@pytest.mark.parametrize(
    ("has", "why"),
    [
        ({"cuda_build": None}, "this torch is built without CUDA"),
        ({"cuda_build": "13.0"}, "needs a driver for CUDA 13.0"),
        ({"gpu": True}, "trainer.accelerator asks for the CPU"),
    ],
)
def test_a_card_is_never_passed_over_in_silence(monkeypatch, has, why):
    machine(monkeypatch, card=True, **has)
    line = device.describe(trainer())
    assert "There is an NVIDIA card that is not used: " in line
    assert why in line
    assert "\n" not in line

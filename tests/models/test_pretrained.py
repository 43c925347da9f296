"""Configs, JSON and files that are written whole or not at all."""

import copy
import json
import os
import pickle

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from ldm_lab.models.pretrained import Configurable, register_to_config
from ldm_lab.models.vq_model import VQModel
from ldm_lab.utils.reading import LoadError, read_json
from ldm_lab.utils.version import __version__
from ldm_lab.utils.writing import replacing, write_json


class Network(Configurable):
    """Refuses what it does not know, as models do."""

    @register_to_config
    def __init__(self, width=2, sizes=(4, 8), name="plain"):
        self.width = width


class Wide(Network):
    """Has an argument of its own, and hands up another than it was given."""

    @register_to_config
    def __init__(self, factor=3):
        super().__init__(width=2 * factor)


class Settings(Configurable):
    """Built from the configs of its relatives, as schedulers are."""

    config_name = "settings.json"
    ignores_unknown = True

    @register_to_config
    def __init__(self, steps=10, betas=None):
        pass


def test_a_config_holds_the_arguments_and_the_defaults():
    network = Network(3, name="other")
    assert network.config == {"width": 3, "sizes": [4, 8], "name": "other"}
    assert network.config.width == 3
    with pytest.raises(AttributeError, match="config has no key 'height'; it has"):
        network.config.height  # noqa: B018


@pytest.mark.parametrize(
    "sizes",
    [(1, 2), [1, 2], np.array([1, 2], dtype=np.float32), torch.tensor([1, 2]), OmegaConf.create([1, 2])],
    ids=["tuple", "list", "array", "tensor", "config library"],
)
def test_sequences_become_lists(sizes):
    given, changed = Network(sizes=sizes), Network()
    changed.register_to_config(sizes=sizes)
    for network in (given, changed):
        assert network.config.sizes == [1, 2]
        assert type(network.config.sizes) is list
        assert json.loads(json.dumps(network.config)) == network.config


def test_nested_values_become_plain():
    assert Settings(betas={"a": ((1, 2), 3)}).config.betas == {"a": [[1, 2], 3]}


def test_a_subclass_keeps_its_own_arguments():
    wide = Wide(factor=2)
    assert wide.config == {"factor": 2}
    assert wide.width == 4


@pytest.mark.parametrize(
    "change",
    [
        lambda config: setattr(config, "width", 1),
        lambda config: delattr(config, "width"),
        lambda config: config.__setitem__("width", 1),
        lambda config: config.__delitem__("width"),
        lambda config: config.__ior__({"width": 1}),
        lambda config: config.update(width=1),
        lambda config: config.setdefault("depth", 1),
        lambda config: config.pop("width"),
        lambda config: config.popitem(),
        lambda config: config.clear(),
    ],
)
def test_a_config_is_frozen_and_so_are_its_copies(change):
    config = Network(3).config
    for frozen in (config, copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        with pytest.raises(TypeError, match=r"frozen: use register_to_config"):
            change(frozen)
        assert frozen == {"width": 3, "sizes": [4, 8], "name": "plain"}


def test_register_to_config_changes_one_object():
    network = Network()
    twin = copy.deepcopy(network)
    network.register_to_config(name="changed")
    assert network.config == {"width": 2, "sizes": [4, 8], "name": "changed"}
    assert twin.config.name == "plain"
    with pytest.raises(TypeError, match="Network has no argument 'depth'; it has"):
        network.register_to_config(depth=1)


def test_configs_go_there_and_back(tmp_path):
    network = Network(3, sizes=[1], name="ü")
    network.save_config(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    name = f"{__name__}.Network"  # with its module, since it is none of the package's
    assert written == {"_class_name": name, "_ldm_lab_version": __version__, **network.config}
    assert Network.load_config(tmp_path) == Network.load_config(tmp_path.parent, tmp_path.name) == written
    assert Network.from_config(written).config == network.config


def test_keyword_arguments_replace_entries_and_missing_keys_take_the_default():
    assert Network.from_config({}).config == Network().config
    assert Network.from_config({"width": 3, "name": "a"}, name="b").config == Network(3, name="b").config
    with pytest.raises(TypeError, match=r"Network has no argument \['depth'\]; it has"):
        Network.from_config({}, depth=1)


def test_models_refuse_what_they_do_not_know():
    with pytest.raises(LoadError, match=r"config of this Network has keys that it does not know: \['depth'\]"):
        Network.from_config({"depth": 1})
    with pytest.raises(LoadError, match="describes a 'UNet2DModel', not a Network"):
        Network.from_config({"_class_name": "UNet2DModel"})
    Network.from_config({"_diffusers_version": "0.0.4", "_name_or_path": "somewhere"})  # not for the constructor


def test_schedulers_ignore_what_they_do_not_know():
    settings = Settings.from_config({"_class_name": "Other", "steps": 5, "depth": 1})
    assert settings.config == {"steps": 5, "betas": None}


def test_json_goes_there_and_back(tmp_path):
    value = {"a": [1, 2.5, None, True], "ü": {"b": "c"}}
    write_json(tmp_path / "new" / "value.json", value)
    assert read_json(tmp_path / "new" / "value.json") == value


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "no such file"),
        (b"", "not readable as JSON: Expecting value"),
        (b"{", "not readable as JSON: Expecting property name"),
        (b"[1]", "holds a list, not an object"),
        (b"[" * 100_000, "not readable as JSON: maximum recursion depth"),
        (b"\xff\xfe", "not readable as JSON: 'utf-8' codec can't decode byte 0xff"),
    ],
)
def test_a_file_without_a_json_object_is_refused_in_one_line(content, expected, tmp_path):
    path = tmp_path / "value.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(LoadError) as error:
        read_json(path)
    assert str(error.value).startswith(f"{path}: {expected}")
    assert "\n" not in str(error.value)


@pytest.fixture
def old(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    return path


def test_the_new_file_takes_the_place_when_all_is_written(old):
    with replacing(old) as temporary:
        temporary.write_text("new")
        assert old.read_text() == "old"
    assert old.read_text() == "new"
    assert list(old.parent.iterdir()) == [old]


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("written", [True, False])
def test_an_exception_leaves_the_old_file(old, kind, written):
    def write_half():
        with replacing(old) as temporary:
            if written:
                temporary.write_text("ne")
            raise kind

    with pytest.raises(kind):
        write_half()
    assert old.read_text() == "old"
    assert list(old.parent.iterdir()) == [old]


def test_json_that_cannot_be_written_leaves_the_old_file(old):
    with pytest.raises(TypeError):
        write_json(old, {"a": 1, "b": object()})
    assert old.read_text() == "old"
    assert list(old.parent.iterdir()) == [old]


def test_what_is_saved_has_the_mode_that_the_umask_gives(tmp_path):
    before = os.umask(0o027)
    try:
        VQModel(block_out_channels=(8,), norm_num_groups=8).save_pretrained(tmp_path)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o640}

"""Model folders: what is saved comes back bit for bit; whatever is wrong with a folder is told in one line."""

import copy

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from ldm_lab.models.pretrained import PretrainedModel, register_to_config
from ldm_lab.utils.reading import LoadError, read_torch
from ldm_lab.utils.weights import LEGACY_WEIGHTS, OWN_WEIGHTS, WEIGHTS
from ldm_lab.utils.writing import SaveError
from tests.helpers import Malicious
from tests.models.weights import assert_equal_weights


class Network(PretrainedModel):
    """One layer, and a buffer that does not hold floating-point numbers."""

    library = "diffusers"  # as if it had a namesake there

    @register_to_config
    def __init__(self, width=2):
        super().__init__()
        if width < 1:
            raise ValueError(f"width={width} is not a positive integer")
        self.conv = nn.Conv1d(width, width, 1)
        self.register_buffer("table", torch.arange(width))


class Counting(Network):
    """Has state that belongs to training."""

    def exported_state_dict(self):
        return {key: value for key, value in self.state_dict().items() if key != "table"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_there_and_back_bit_for_bit(dtype, tmp_path):
    network = Network(3).to(dtype).train()
    network.save_pretrained(tmp_path / "new" / "folder")
    back = Network.from_pretrained(tmp_path / "new", subfolder="folder")
    assert_equal_weights(back, network)
    assert back.config == network.config
    assert (back.dtype, back.device) == (dtype, torch.device("cpu"))
    assert not back.training
    assert all(parameter.requires_grad for parameter in back.parameters())


def test_what_diffusers_does_not_have_it_does_not_find(tmp_path):
    class Own(Network):
        library = "somewhere"

    network = Own(3)
    network.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", OWN_WEIGHTS}
    assert_equal_weights(Own.from_pretrained(tmp_path), network)
    (tmp_path / OWN_WEIGHTS).unlink()
    with pytest.raises(LoadError, match=f": neither {OWN_WEIGHTS} nor model.bin is there$"):
        Own.from_pretrained(tmp_path)


def test_the_weights_take_the_type_asked_for(tmp_path):
    Network().save_pretrained(tmp_path)
    back = Network.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert (back.dtype, back.table.dtype) == (torch.bfloat16, torch.int64)


def test_parameters_are_counted():
    network = Network(3)
    network.conv.bias.requires_grad_(False)
    assert network.num_parameters() == 3 * 3 + 3
    assert network.num_parameters(only_trainable=True) == 3 * 3


def test_the_weights_name_their_framework(tmp_path):
    """Without this entry diffusers refuses the file."""
    Network().save_pretrained(tmp_path)
    with safe_open(tmp_path / WEIGHTS, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_state_of_training_stays_out_of_the_folder(tmp_path):
    network = Counting()
    network.table += 5
    network.save_pretrained(tmp_path)
    with safe_open(tmp_path / WEIGHTS, "pt") as file:
        assert set(file.keys()) == {"conv.weight", "conv.bias"}
    other = Counting()
    other.load_weights(network.exported_state_dict(), origin="here")
    assert torch.equal(other.conv.weight, network.conv.weight)
    assert other.table.tolist() == [0, 1]


def test_assigning_takes_the_tensors_and_copying_their_values():
    state = Network().state_dict()
    copied, assigned = Network(), Network()
    copied.load_weights(state, origin="here")
    assigned.load_weights(state, origin="here", assign=True)
    assert assigned.conv.weight.data_ptr() == state["conv.weight"].data_ptr()
    assert copied.conv.weight.data_ptr() != state["conv.weight"].data_ptr()
    assert torch.equal(copied.conv.weight, state["conv.weight"])


def test_names_of_2022_are_understood():
    names = ["mid.query.weight", "mid.key.bias", "value.weight", "a.proj_attn.bias", "conv_query.weight"]
    renamed = list(PretrainedModel.rename_legacy_keys(dict.fromkeys(names)))
    assert renamed == ["mid.to_q.weight", "mid.to_k.bias", "to_v.weight", "a.to_out.0.bias", "conv_query.weight"]


def test_a_bin_is_read_where_there_is_no_safetensors(tmp_path):
    network, other = Network(), Network()
    network.save_pretrained(tmp_path)
    torch.save(other.state_dict(), tmp_path / LEGACY_WEIGHTS)
    assert_equal_weights(Network.from_pretrained(tmp_path), network)
    (tmp_path / WEIGHTS).unlink()
    assert_equal_weights(Network.from_pretrained(tmp_path), other)


def test_weights_that_cannot_be_written_leave_the_old_folder(tmp_path, monkeypatch):
    def fail_half_way(_, path, **__):
        path.write_bytes(b"half")
        raise OSError("disk full")

    Network().save_pretrained(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr("ldm_lab.utils.weights.save_file", fail_half_way)
    with pytest.raises(SaveError, match="disk full"):
        Network(3).save_pretrained(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.fixture
def folder(tmp_path):
    Network().save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def legacy_folder(folder):
    (folder / WEIGHTS).unlink()
    torch.save(Network().state_dict(), folder / LEGACY_WEIGHTS)
    return folder


def refusal(folder):
    """The one line that loading ends with, without the folder's name, which it begins with."""
    with pytest.raises(LoadError) as error:
        Network.from_pretrained(folder)
    text = str(error.value)
    assert text.startswith(str(folder))
    assert "\n" not in text
    return text.removeprefix(str(folder))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"conv.bias": None}, ": no tensor 'conv.bias' for this Network (1 missing)"),
        ({"more": torch.zeros(1)}, ": Network has no place for 'more' (1 left over)"),
        ({"conv.bias": torch.zeros(3)}, ": conv.bias has shape (3,), this Network needs (2,)"),
        ({"conv.bias": torch.zeros(1)}, ": conv.bias has shape (1,), this Network needs (2,)"),
        ({"conv.bias": torch.zeros(2).char()}, ": conv.bias holds torch.int8, this Network needs torch.float32"),
        ({"table": torch.zeros(2)}, ": table holds torch.float32, this Network needs torch.int64"),
    ],
    ids=["missing", "left over", "shape", "shape that broadcasts", "integers", "no integers"],
)
def test_tensors_of_another_network(folder, change, expected):
    state = {**Network().state_dict(), **change}
    save_file({key: value for key, value in state.items() if value is not None}, folder / WEIGHTS)
    assert refusal(folder) == expected


def test_a_refusal_leaves_the_network_as_it_was():
    network = Network()
    before = copy.deepcopy(network)
    with pytest.raises(LoadError, match=r"^here: "):
        network.load_weights({**Network().state_dict(), "table": torch.arange(9)}, origin="here")
    assert_equal_weights(network, before)


@pytest.mark.parametrize("length", [0, 5, 100, -1])
def test_truncated_safetensors(folder, length):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:length])
    assert refusal(folder).startswith(f"/{WEIGHTS}: cannot be read: ")


@pytest.mark.parametrize("length", [0, 1, 5, 100, -1])
def test_a_truncated_bin(legacy_folder, length):
    path = legacy_folder / LEGACY_WEIGHTS
    path.write_bytes(path.read_bytes()[:length])
    assert refusal(legacy_folder).startswith(f"/{LEGACY_WEIGHTS}: ")


@pytest.mark.parametrize("content", [[1, 2], {"conv.bias": 3}, {1: torch.zeros(2)}, torch.zeros(2)])
def test_a_bin_without_named_tensors(legacy_folder, content):
    torch.save(content, legacy_folder / LEGACY_WEIGHTS)
    assert refusal(legacy_folder) == f"/{LEGACY_WEIGHTS}: does not hold tensors by name"


def test_no_weights(folder):
    (folder / WEIGHTS).unlink()
    assert refusal(folder) == f": neither {WEIGHTS} nor {LEGACY_WEIGHTS} is there"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, "no such file"),
        ("{", "not readable as JSON: "),
        ('{"_class_name": "VQModel"}', "this config describes a 'VQModel', not a Network"),
        ('{"depth": 3}', "the config of this Network has keys that it does not know: ['depth']"),
        ('{"width": -1}', "width=-1 is not a positive integer"),
        ('{"width": "two"}', "'<' not supported between instances of 'str' and 'int'"),
    ],
)
def test_configs_of_something_else(folder, text, expected):
    (folder / "config.json").unlink()
    if text is not None:
        (folder / "config.json").write_text(text)
    assert refusal(folder).startswith(f"/config.json: {expected}")


def test_a_folder_that_is_not_there(tmp_path):
    assert refusal(tmp_path / "nowhere") == "/config.json: no such file"


@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_is_run_by_loading(legacy_folder, zipped):
    proof, path = legacy_folder / "proof", legacy_folder / LEGACY_WEIGHTS
    state = {**Network().state_dict(), "more": Malicious(proof)}
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    assert "could run code and is not loaded" in refusal(legacy_folder)
    assert not proof.exists()

    torch.load(path, weights_only=False)["more"].close()
    assert proof.exists(), "the file is harmless: what stands above proves nothing"


def test_objects_are_not_rebuilt_either(tmp_path):
    torch.save(Network(), tmp_path / "model.bin")
    with pytest.raises(LoadError, match="holds more than tensors and plain data"):
        read_torch(tmp_path / "model.bin")

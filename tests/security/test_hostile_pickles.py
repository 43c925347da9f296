"""Files of torch from strangers: pickles that call, pickles that grow, archives that are none."""

import _codecs
import collections
import functools
import io
import os
import pickle
import subprocess
import zipfile
from pathlib import Path

import hydra
import pytest
import torch

from ldm_lab import LDMPipeline
from ldm_lab.checkpoints import checkpoint
from ldm_lab.utils.reading import MAX_REPEATED, read_torch
from tests.security import sources
from tests.security.guard import refusal


@pytest.fixture
def load(tmp_path):
    """Loads a source; returns the line that this is refused with."""
    return lambda source: refusal(lambda: LDMPipeline.from_pretrained(source), tmp_path)


class Call:
    """Unpickling this calls a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call

    def __call__(self):
        """What a pickle calls must look as if it could be called."""


def payloads(trace):
    """Pickled calls that leave a trace, or take memory, where a reader makes them."""
    touch = f"touch {trace}"
    hexed = b"x"
    for _ in range(40):
        hexed = Call(_codecs.encode, hexed, "hex")
    return {
        "os.system": Call(os.system, touch),
        "eval": Call(eval, f"open({str(trace)!r}, 'w')"),
        "exec": Call(exec, f"open({str(trace)!r}, 'w')"),
        "Popen": Call(subprocess.Popen, ["touch", str(trace)]),
        "open": Call(open, str(trace), "w"),
        "partial": Call(functools.partial, os.system, touch),
        "a called partial": Call(Call(functools.partial, os.system, touch)),
        "getattr": Call(getattr, Call(__import__, "os"), "system"),
        "get_method": Call(hydra.utils.get_method, "os.system"),
        "instantiate": Call(hydra.utils.instantiate, {"_target_": "os.system", "_args_": [touch]}),
        "torch.load": Call(torch.load, str(trace)),
        "torch.hub.load": Call(torch.hub.load, str(trace), "model"),
        "pickle.loads": Call(pickle.loads, pickle.dumps(Call(os.system, touch))),
        "ten gigabytes of nothing": Call(bytearray, 10**10),
        "a terabyte by doubling": hexed,
        "a tensor of a terabyte": Call(torch.FloatTensor, 2**38),
        "a storage of a terabyte": Call(torch.UntypedStorage, 2**40),
        "a tensor without memory": torch.zeros(2**40, device="meta"),
        "a sparse tensor of a terabyte": torch.sparse_coo_tensor(torch.zeros(1, 1), torch.ones(1), (2**38,)),
        "a path": Path("/etc/passwd"),
        "a class": collections.UserDict,
        "a network": torch.nn.Linear(1, 1),
    }


PLACES = ("callbacks", "ldm_lab.configs.unet", "optimizer_states", "hyper_parameters")
EVERYWHERE = [(name, "state_dict.evil") for name in payloads(Path("trace"))]
EVERYWHERE += [
    (name, place) for name in ("os.system", "a called partial", "a terabyte by doubling") for place in PLACES
]


@pytest.mark.parametrize(("name", "place"), EVERYWHERE)
def test_pickles_in_training_checkpoints(tmp_path, load, name, place):
    payload = payloads(tmp_path / "trace")[name]
    state = sources.put(
        sources.training_state(), place, [{"state": payload}] if place == "optimizer_states" else payload
    )
    torch.save(state, tmp_path / "last.ckpt")
    assert load(tmp_path / "last.ckpt").startswith(f"{tmp_path}/last.ckpt: ")
    assert "could run code and is not loaded" in refusal(lambda: checkpoint.load(tmp_path / "last.ckpt"), tmp_path)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before 1.6"])
@pytest.mark.parametrize("name", ["os.system", "eval", "partial", "a terabyte by doubling", "ten gigabytes of nothing"])
@pytest.mark.parametrize("kind", ["compvis", "compvis callback", "bin"])
def test_pickles_elsewhere(tmp_path, load, name, kind, zipped):
    payload = payloads(tmp_path / "trace")[name]
    path = source = tmp_path / "model.ckpt"
    state = {"state_dict": {**sources.compvis_state()["state_dict"], "evil": payload}}
    if kind == "compvis callback":
        state = {**sources.compvis_state(), "callbacks": {"a": payload}}
    if kind == "bin":
        folder = sources.pipeline(tmp_path)
        (folder / sources.WEIGHTS).unlink()
        path, source, state = folder / sources.BIN, folder, {"conv_in.weight": payload}
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    assert "could run code and is not loaded" in load(source)
    assert not (tmp_path / "trace").exists()


def bomb(levels=12):
    """Lists of ten times the same list: 10^levels entries in a few bytes."""
    tree = ["x"]
    for _ in range(levels):
        tree = [tree] * 10
    return tree


def endless():
    tree = []
    tree.append(tree)
    return tree


PLAIN = {
    "configs.unet.block_out_channels": [bomb(), endless(), torch.zeros(3), {1, 2}],
    "configs.unet": [{"a": bomb()}, {1: 2}, 7, {}],
    "configs.unet._class_name": [bomb(), "os.system", None, {"a": 1}],
    "configs.scheduler": [None, [], {"num_train_timesteps": 10**12}, {"trained_betas": [0.1, 2.0]}],
    "configs.scheduler._class_name": ["os.system", "../x"],
    "configs": [[], {}, {"unet": {}}, bomb()],
    "prefixes": [[], {"unet": 7}, {"unet": None, "vqvae": 1}],
    "prefixes.unet": ["", "nowhere", "autoencoder."],
    "images_seen": ["8", None, 1.5, bomb()],
    "stage": [7, bomb()],
}
ENTRIES = [(key, value) for key, values in PLAIN.items() for value in values]


@pytest.mark.parametrize(("key", "value"), ENTRIES, ids=[f"{key}-{place}" for place, (key, _) in enumerate(ENTRIES)])
def test_what_explains_a_checkpoint(tmp_path, load, key, value):
    torch.save(sources.put(sources.training_state(), f"ldm_lab.{key}", value), tmp_path / "last.ckpt")
    assert "last.ckpt: " in load(tmp_path / "last.ckpt")


def test_tensors_that_repeat_a_few_bytes(tmp_path):
    path = tmp_path / "model.ckpt"
    for content in (
        [torch.zeros(1).expand(10**6, 10**6)],
        [torch.zeros(1000), torch.zeros(1000).expand(99, 1000)],
    ):
        torch.save(content, path)
        assert "far larger than the file" in refusal(lambda: read_torch(path), tmp_path)
    shared = torch.zeros(1000)
    torch.save([shared.view(10, 100) for _ in range(MAX_REPEATED - 1)], path)
    assert len(read_torch(path)) == MAX_REPEATED - 1


def archive(path, change):
    """Write what `change(name, content)` makes of a checkpoint's parts: `(name, content, compression)` each."""
    whole = io.BytesIO()
    torch.save(sources.training_state(), whole)
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(path, "w") as new:
        for entry in old.infolist():
            for name, content, compression in change(entry.filename, old.read(entry)):
                new.writestr(name, content, compression)


STORED, DEFLATED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED
ARCHIVES = {
    "compressed": lambda name, content: [(name, content + bytes(10**7) * name.endswith("data/0"), DEFLATED)],
    "compressed pickle": lambda name, content: [(name, content + bytes(10**8) * name.endswith(".pkl"), DEFLATED)],
    "two pickles": lambda name, content: [(name, content, STORED)] + [("x/data.pkl", b"N.", STORED)] * ("pkl" in name),
    "no pickle": lambda name, content: [] if name.endswith(".pkl") else [(name, content, STORED)],
    "a script": lambda name, content: [(name, content, STORED), (name.replace("data", "constants"), b"N.", STORED)],
    "names with ../": lambda name, content: [(f"../../{name}", content, STORED)],
    "no tensors": lambda name, content: [] if "data/" in name else [(name, content, STORED)],
    "short tensors": lambda name, content: [(name, content[:3] if "data/" in name else content, STORED)],
}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("change", ARCHIVES.values(), ids=ARCHIVES)
def test_archives(tmp_path, load, change):
    archive(tmp_path / "last.ckpt", change)
    assert "last.ckpt: " in load(tmp_path / "last.ckpt")

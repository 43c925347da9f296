"""Spoiled models, drawn at random: each either loads and draws finite images, or is refused in one line.

The ordinary number of examples takes seconds; `pytest -m soak tests/security -s` takes minutes and tells the counts.
"""

import copy
import json
import os
import resource
import shutil
import signal
import struct
import time
from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ldm_lab import LDMPipeline
from ldm_lab.runs.folder import RunFolder
from tests.security import sources

MANY = 200  # examples are a soak
SECONDS, MEMORY = 20, 2**30  # for one example; growth of the process over all of a test, in bytes
LARGEST_DRAWN = 32  # sides of latents

WORDS = (
    "silu", "group", "linear", "scaled_linear", "squaredcos_cap_v2", "sample", "v_prediction", "epsilon",
    "trailing", "linspace", "resnet", "conv", "scale_shift", "DownBlock2D", "AttnDownBlock2D",
    "ResnetUpsampleBlock2D", "os.system", "../x", "UNet2DModel", "VQModel", "1", "true",
)  # fmt: skip
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 70),
    st.sampled_from([2**31, 2**63, -(2**63), 10**12, 10**30, 10**400, 2**16, 4096]),
    st.floats(),
    st.sampled_from([1e-300, 1e300, 0.5, 1e-8, -0.0]),
    st.text(max_size=8),
    st.sampled_from(WORDS),
)
VALUES = st.recursive(
    SCALARS, lambda below: st.lists(below, max_size=4) | st.dictionaries(st.text(max_size=4), below), max_leaves=8
)
CHANGES = st.sampled_from(["replace", "delete", "rename", "repeat", "inside"])


def examples(number):
    """Few as a matter of course, many in a soak."""
    return pytest.mark.parametrize("number", [number, pytest.param(40 * number, marks=pytest.mark.soak)])


def fuzz(number, **strategies):
    """Run the decorated function on so many examples; always the same few, but other ones in every soak."""
    common = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
    many = number >= MANY

    def run(check):
        settings(max_examples=number, derandomize=not many, **common)(given(**strategies)(check))()

    return run


@pytest.fixture
def watch(request, capsys):
    """Calls what loads or draws; counts how it ends, and tells."""
    counts, before = Counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.monotonic()
    signal.signal(signal.SIGALRM, _hangs)

    def watch(act):
        signal.alarm(SECONDS)
        try:
            counts[act()] += 1
        except ValueError as error:
            counts["refused"] += 1
            line = str(error)
        else:
            line = "fine"
        finally:
            signal.alarm(0)
        assert line.isprintable(), "more than one line"
        assert 0 < len(line) < 2000

    yield watch
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    with capsys.disabled():
        if counts.total() >= MANY:
            took = f"{time.monotonic() - began:.0f} s, {grown / 2**20:.0f} MiB more"
            print(f"\n{request.node.name}: {counts.total()} examples, {dict(counts)}, {took}")
    assert grown < MEMORY


def _hangs(*_):
    raise AssertionError(f"took more than {SECONDS} s")


def drawn(pipe):
    """What a pipeline that could be loaded comes to: images are finite, or a `ValueError` says that they are not."""
    size = pipe.unet.config.sample_size
    if size is None or max([size] if isinstance(size, int) else size) > LARGEST_DRAWN:
        return "loaded"
    pipe.set_progress_bar_config(disable=True)
    images = pipe(generator=torch.Generator().manual_seed(0), num_inference_steps=2, output_type="np").images
    assert images.min() >= 0
    assert images.max() <= 1
    return "drawn"


def change(data, tree):
    """A copy of nested dicts with one or two entries spoiled."""
    tree = copy.deepcopy(tree)
    for _ in range(data.draw(st.integers(1, 2))):
        node, kind = tree, data.draw(CHANGES)
        while kind == "inside" and any(isinstance(value, (dict, list)) and value for value in _items(node).values()):
            node = data.draw(st.sampled_from([v for v in _items(node).values() if isinstance(v, (dict, list)) and v]))
            kind = data.draw(CHANGES)
        if not node:
            continue
        key = data.draw(st.sampled_from(sorted(_items(node), key=str)))
        if kind in ("delete", "rename"):
            value = node.pop(key)
            if kind == "rename" and isinstance(node, dict):
                node[data.draw(st.text(max_size=6))] = value
        elif kind == "repeat" and isinstance(node, list):
            node *= data.draw(st.sampled_from([2, 17, 1000]))
        else:
            node[key] = data.draw(VALUES)
    return tree


def _items(node):
    return node if isinstance(node, dict) else dict(enumerate(node))


def bytes_changed(data, content, hot):
    """A copy of `content` with bytes flipped, left out or put in, most of them among the first `hot`."""
    content = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        end = max(min(hot, len(content)) if data.draw(st.integers(0, 3)) else len(content), 1)
        place = data.draw(st.integers(0, end - 1))
        kind = data.draw(st.sampled_from(["set", "flip", "cut", "truncate", "insert", "copy"]))
        if kind == "set":
            content[place : place + 1] = data.draw(st.binary(min_size=1, max_size=8))
        elif kind == "flip" and content:
            content[min(place, len(content) - 1)] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "cut":
            del content[place : place + data.draw(st.integers(1, 64))]
        elif kind == "truncate":
            del content[place:]
        elif kind == "insert":
            content[place:place] = data.draw(st.binary(max_size=16))
        else:
            content[place:place] = content[place : place + data.draw(st.integers(1, 256))]
    return bytes(content)


def replace(path, content):
    """Write a new file: the old one may be a second name of a recorded one."""
    path.unlink()
    path.write_bytes(content)


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(sources.FOLDER, tmp_path / "pipeline", copy_function=os.link)


@examples(15)
def test_configs(folder, watch, number):
    files = {path: (sources.FOLDER / path).read_bytes() for path in ("model_index.json", *sources.CONFIGS.values())}

    @fuzz(number, data=st.data(), path=st.sampled_from(sorted(files)))
    def check(data, path):
        replace(folder / path, json.dumps(change(data, json.loads(files[path]))).encode())
        watch(lambda: drawn(LDMPipeline.from_pretrained(folder)))
        replace(folder / path, files[path])


@examples(15)
def test_bytes_of_configs(folder, watch, number):
    files = {path: (sources.FOLDER / path).read_bytes() for path in ("model_index.json", *sources.CONFIGS.values())}

    @fuzz(number, data=st.data(), path=st.sampled_from(sorted(files)))
    def check(data, path):
        replace(folder / path, bytes_changed(data, files[path], 2000))
        watch(lambda: drawn(LDMPipeline.from_pretrained(folder)))
        replace(folder / path, files[path])


@examples(8)
def test_header_of_safetensors(folder, watch, number):
    content = (folder / sources.WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])

    @fuzz(number, data=st.data())
    def check(data):
        text = json.dumps(change(data, header)).encode()
        replace(folder / sources.WEIGHTS, struct.pack("<Q", len(text)) + text + content[8 + length :])
        watch(lambda: drawn(LDMPipeline.from_pretrained(folder)))


@examples(8)
def test_bytes_of_safetensors(folder, watch, number):
    content = (folder / sources.WEIGHTS).read_bytes()

    @fuzz(number, data=st.data())
    def check(data):
        replace(folder / sources.WEIGHTS, bytes_changed(data, content, 8000))
        watch(lambda: drawn(LDMPipeline.from_pretrained(folder)))


def _spoil_tensor(data, state):
    key = data.draw(st.sampled_from(sorted(state)))
    value = state[key]
    spoiled = [
        value.double(), value.half(), value.long(), value.to(torch.complex64), value.flatten(), value[None],
        value * float("inf"), value * 1e30, value * 0, value[..., :0], value.new_zeros(()), value.to(torch.float8_e5m2),
        value.new_zeros(1).expand(value.shape), value.to("meta"), 3, "a", None, [value], {"a": value},
    ]  # fmt: skip
    kind = data.draw(st.sampled_from(["value", "rename", "delete", "key"]))
    state = dict(state)
    if kind != "value":
        del state[key]
    if kind == "value":
        state[key] = data.draw(st.sampled_from(range(len(spoiled))).map(spoiled.__getitem__))
    elif kind == "rename":
        state[key + data.draw(st.text(max_size=4))] = value
    elif kind == "key":
        state[data.draw(st.integers() | st.none() | st.text(max_size=20))] = value
    return state


@examples(6)
@pytest.mark.parametrize("kind", ["training", "compvis", "compvis and its config"])
def test_contents_of_checkpoints(tmp_path, watch, number, kind):
    path, config = tmp_path / "model.ckpt", tmp_path / "config.yaml"
    whole = sources.training_state() if kind == "training" else sources.compvis_state()
    entry = {key: value for key, value in whole.items() if key == "ldm_lab"} or sources.compvis_config()

    @fuzz(number, data=st.data(), tensors=st.booleans())
    def check(data, tensors):
        state = {**whole, "state_dict": _spoil_tensor(data, whole["state_dict"])} if tensors else dict(whole)
        spoiled = entry if tensors else change(data, entry)
        if kind == "training":
            state |= spoiled
        elif kind != "compvis":
            config.write_text(json.dumps(spoiled))  # which is YAML
        torch.save(state, path)
        watch(lambda: drawn(LDMPipeline.from_pretrained(path)))


@examples(6)
@pytest.mark.parametrize("kind", ["training", "compvis", "bin", "bin of before 1.6"])
def test_bytes_of_torch_files(tmp_path, watch, number, kind):
    source = path = tmp_path / "model.ckpt"
    if kind == "training":
        torch.save(sources.training_state(), path)
    elif kind == "compvis":
        shutil.copyfile(sources.COMPVIS, path)
    else:
        source = sources.pipeline(tmp_path)
        path = source / sources.BIN
        (source / sources.WEIGHTS).unlink()
        weights = LDMPipeline.from_pretrained(sources.FOLDER).unet.state_dict()
        torch.save(weights, path, _use_new_zipfile_serialization=kind == "bin")
    content = path.read_bytes()

    @fuzz(number, data=st.data(), at_the_end=st.booleans())
    def check(data, at_the_end):
        turn = slice(None, None, -1 if at_the_end else 1)  # the directory of an archive lies at its end
        path.write_bytes(bytes_changed(data, content[turn], 20_000)[turn])
        watch(lambda: drawn(LDMPipeline.from_pretrained(source)))


@examples(30)
def test_files_of_a_run(tmp_path, watch, number):
    stage = sources.run_folder(tmp_path)
    names = ("config.yaml", "status.json", "metrics.csv", "wandb_id")
    files = {name: (stage / name).read_bytes() for name in names}

    def read():
        from ldm_lab.training.loggers.csv import MetricsCSV
        from ldm_lab.training.loggers.wandb import WandbLogger

        run = RunFolder(stage)
        run.started_with()
        run.finished(64, None)
        assert WandbLogger(stage, "project", "group", "diffusion").version
        metrics = MetricsCSV(stage)
        metrics.log_metrics({"images_seen": 24, "train/loss": 1.0})
        metrics.flush()
        return "read"

    @fuzz(number, data=st.data(), name=st.sampled_from(names))
    def check(data, name):
        (stage / name).write_bytes(bytes_changed(data, files[name], 200))
        watch(read)
        for each in names:
            (stage / each).write_bytes(files[each])

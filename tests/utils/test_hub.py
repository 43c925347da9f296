"""Names on the Hugging Face hub, through the real client and a small hub of our own on this machine."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from ldm_lab import LDMPipeline
from ldm_lab.utils import hub
from ldm_lab.utils.reading import LoadError
from tests.helpers import GOLDEN, contents
from tests.hub_server import Hub, commit_of, point_to

TINY = GOLDEN / "diffusers/ldm_tiny"
LEGACY = GOLDEN / "diffusers/ldm_tiny_legacy"
ROOT = Path(__file__).resolve().parents[2]
CLOSED = "http://127.0.0.1:9"  # nobody listens there


@pytest.fixture(autouse=True)
def world(tmp_path, monkeypatch):
    """Our hub, an empty cache, and an empty folder to be in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "AGENT_HARNESSES_PATH", str(tmp_path / "harnesses"), raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    ours = Hub()
    ours.add("owner/tiny", contents(TINY))
    ours.add("owner/legacy", contents(LEGACY))
    point_to(monkeypatch, ours.endpoint)
    yield ours
    ours.close()


def generate(folder):
    pipe = LDMPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe(1, torch.Generator().manual_seed(0), num_inference_steps=2, output_type="pt").images


def failure(*args, **kwargs):
    """The one line that a `fetch` ends with, in seconds."""
    start = time.monotonic()
    with pytest.raises(LoadError) as caught:
        hub.fetch(*args, **kwargs)
    assert time.monotonic() - start < 5
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith(args[0])
    return line


# What is a name.


@pytest.mark.parametrize("source", ["owner/model", "CompVis/ldm-celebahq-256", "o/m_1.0@main", "o/m@v1.2", Path("o/m")])
def test_names(source):
    assert hub.is_name(source)


@pytest.mark.parametrize(
    "source",
    ["model", "a/b/c", "/owner/model", "./model", "../model", "owner/", "/model", "", "owner/model@", "owner/mo del"]
    + ["owner/.model", "~/model", "owner/möbel", "owner/model\n", "C:\\owner\\model", "hf://owner/model"]
    + [f"owner/model{suffix}" for suffix in (".ckpt", ".pt", ".safetensors", ".yaml", ".ckpt@main")],
)  # fmt: skip
def test_what_is_no_name(source):
    assert not hub.is_name(source)


def test_what_is_here_is_no_name(tmp_path):
    """Nor is anything else below a folder that is here: it would be a typing error."""
    assert hub.is_name("runs/x")
    (tmp_path / "runs/x").mkdir(parents=True)
    assert not any(map(hub.is_name, ["runs/x", "runs/x@2M", "runs/y", Path("runs/y")]))


def test_local_asks_the_hub_for_names_only(world):
    assert hub.local("some/where/else") == Path("some/where/else")
    assert not world.asked
    assert hub.local("owner/tiny") == hub.fetch("owner/tiny")


# What is fetched.


@pytest.mark.parametrize(("name", "folder"), [("owner/tiny", TINY), ("owner/legacy", LEGACY)])
def test_the_model_arrives_and_is_the_same(name, folder):
    fetched = hub.fetch(name)
    assert contents(fetched) == contents(folder)
    assert torch.equal(generate(fetched), generate(folder))


def test_only_what_can_be_loaded_is_fetched(world):
    files = contents(TINY)
    rest = ["README.md", "picture.png", "unet/diffusion_pytorch_model.bin", "vqvae/diffusion_pytorch_model.bin"]
    rest += ["unet/model.onnx", "deep/down/config.json", "deep/down/model.safetensors", "unet/x.fp16.safetensors"]
    world.add("owner/full", files | dict.fromkeys(rest, b"x"))
    assert contents(hub.fetch("owner/full")) == files
    assert sorted(world.served) == sorted(f"owner/full/{path}" for path in files)


def test_pickled_weights_only_where_there_are_no_others(world):
    files, legacy = contents(TINY), contents(LEGACY)
    mixed = {path: body for path, body in files.items() if not path.startswith("unet/")}
    mixed |= {path: body for path, body in legacy.items() if path.startswith("unet/")}
    world.add("owner/mixed", mixed | {"vqvae/diffusion_pytorch_model.bin": b"x", "scheduler/a.bin": b"x"})
    assert contents(hub.fetch("owner/mixed")) == mixed


@pytest.mark.parametrize("weights", ["diffusion_pytorch_model.safetensors", "model.safetensors", "other.bin"])
def test_a_repository_of_one_network(world, weights):
    files = {"config.json": b"{}", weights: b"x"}
    world.add("owner/one", files | {"diffusion_pytorch_model.bin": b"y"})
    expected = {"config.json": b"{}"}
    expected |= {"diffusion_pytorch_model.bin": b"y"} if weights == "other.bin" else {weights: b"x"}
    assert contents(hub.fetch("owner/one")) == expected


def test_another_kind_of_pipeline_is_refused_before_its_weights_are_fetched(world):
    index = json.dumps({"_class_name": "StableDiffusionPipeline"}).encode()
    world.add("owner/text", {"model_index.json": index, "unet/model.safetensors": b"x"})
    assert "is a 'StableDiffusionPipeline', not an LDMPipeline" in failure("owner/text")
    assert world.served == ["owner/text/model_index.json"]


def test_a_repository_without_configs_is_refused(world):
    world.add("owner/file", {"model.ckpt": b"x", "model.safetensors": b"x"})
    assert "holds no configs" in failure("owner/file")
    assert not world.served


# Revision and cache.


def test_revisions(world):
    other = contents(TINY) | {"scheduler/scheduler_config.json": b"{}"}
    world.add("owner/tiny", other, revision="v1.0")
    main = hub.fetch("owner/tiny")
    for fetched in (
        hub.fetch("owner/tiny@v1.0"),
        hub.fetch("owner/tiny", "v1.0"),
        hub.fetch("owner/tiny@v1.0", "v1.0"),
    ):
        assert contents(fetched) == other
    assert contents(hub.fetch("owner/tiny", commit_of("owner/tinyv1.0"))) == other
    assert contents(main) == contents(TINY)
    assert "'v1.0', but revision='main'" in failure("owner/tiny@v1.0", "main")


def test_a_push_in_the_middle_changes_nothing(world):
    """The weights are of the commit that the configs are of."""
    world.add("owner/tiny", {"config.json": b"{}"}, revision="pushed")
    before = world.answer
    world.answer = lambda path: before(path.replace("revision/main", "revision/pushed") if world.served else path)
    assert contents(hub.fetch("owner/tiny")) == contents(TINY)


def test_the_cache_is_the_one_that_is_named(tmp_path):
    default, named = hub.fetch("owner/tiny"), hub.fetch("owner/tiny", cache_dir=tmp_path / "elsewhere")
    assert default.is_relative_to(tmp_path / "cache")
    assert named.is_relative_to(tmp_path / "elsewhere")


@pytest.mark.parametrize("name", ["owner/tiny", "owner/legacy"])
def test_what_is_in_the_cache_is_fetched_no_more(world, name):
    first = hub.fetch(name)
    served = list(world.served)
    assert hub.fetch(name) == first
    assert world.served == served
    world.asked.clear()
    assert hub.fetch(name, local_files_only=True) == first
    assert not world.asked


@pytest.mark.parametrize("name", ["owner/tiny", "owner/legacy", f"owner/tiny@{commit_of('owner/tinymain')}"])
@pytest.mark.parametrize("reason", ["offline", "dead", "gone", "broken"])
def test_the_cache_serves_where_the_hub_does_not(world, monkeypatch, caplog, name, reason):
    first = hub.fetch(name)
    if reason == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    elif reason == "dead":
        point_to(monkeypatch, CLOSED)
    else:
        world.refusals["owner/"] = (404, "RepoNotFound") if reason == "gone" else (503, None)
    assert hub.fetch(name) == first
    warnings = [record.getMessage() for record in caplog.records if record.name == hub.__name__]
    assert len(warnings) == (reason != "offline")  # whoever asks for it knows
    assert all("the copy in the cache is used" in line and "\n" not in line for line in warnings)


def test_half_a_model_is_not_taken_from_the_cache(world):
    world.refusals["vqvae/diffusion"] = (404, "EntryNotFound")
    failure("owner/tiny")
    assert "not whole in the cache" in failure("owner/tiny", local_files_only=True)
    world.refusals.clear()
    assert contents(hub.fetch("owner/tiny")) == contents(TINY)


def test_the_environment_is_honoured(tmp_path):
    """A process of its own: the library reads these variables once."""
    folder = hub.fetch("owner/tiny", cache_dir=tmp_path / "home/hub")
    code = "from ldm_lab import hub; print(hub.fetch('owner/tiny'))"
    variables = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    others = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGINGFACE_"))}
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=others | variables).stdout
    assert out.strip() == str(folder)


def test_the_token_goes_with_every_request(world, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.fetch("owner/tiny")
    assert set(world.tokens) == {"Bearer hf_secret"}


# What goes wrong.


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert 'pip install "ldm_lab[hub]"' in failure("owner/tiny")


@pytest.mark.parametrize(
    ("refused", "answer", "words"),
    [
        ("nothing", None, "nothing local has this name, nor has a model on http://127.0.0.1"),
        ("api/models/owner/tiny", (401, "RepoNotFound"), "if it is private, log in"),
        ("api/models/owner/tiny", (401, None), "if it is private, log in"),
        ("api/models/owner/tiny", (403, "GatedRepo"), "access is granted on request: ask for it on http://127.0.0.1"),
        ("resolve", (401, "GatedRepo"), "owner/tiny, then log in with"),
        ("api/models/owner/tiny", (403, None), "403 Forbidden"),
        ("api/models/owner/tiny", (503, None), "503 Service Unavailable"),
        ("resolve", (403, None), "is of no help"),
    ],
)
def test_refusals(world, refused, answer, words):
    if answer:
        world.refusals[refused] = answer
    assert words in failure("owner/tiny" if answer else "owner/nothing")


def test_a_revision_that_is_not_there():
    assert "has this model, but no revision 'v9'" in failure("owner/tiny@v9")
    assert "has this model, but no revision 'v9'" in failure("owner/tiny", "v9")


@pytest.mark.parametrize("name", ["owner/tiny", "owner/tiny@v1.0", f"owner/tiny@{commit_of('a')}"])
@pytest.mark.parametrize("endpoint", [CLOSED, "http://no-such-host.invalid"])
def test_without_network(monkeypatch, name, endpoint):
    point_to(monkeypatch, endpoint)
    line = failure(name)
    assert "nothing local has this name, nor is it whole in the cache" in line
    assert endpoint in line


def test_a_hub_that_does_not_answer(monkeypatch):
    """It takes the connection and falls silent, as behind some firewalls."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        point_to(monkeypatch, f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "0.2")
        assert "timed out" in failure("owner/tiny").lower()


def test_offline_and_not_in_the_cache(world, monkeypatch):
    assert "the hub may not be asked" in failure("owner/tiny", local_files_only=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "the hub may not be asked" in failure("owner/tiny")
    assert not world.asked


@pytest.mark.parametrize("name", ["owner/mo--del", "a/b/c", "owner/mo del", "owner/model.git"])
def test_names_that_the_hub_does_not_have(world, name):
    failure(name)
    assert not world.asked

"""Places that cannot be written: one line, at the start, that names the key."""

import contextlib
import errno
import os
import shutil
import tempfile
from pathlib import Path

import pytest

import sample
from ldm_lab import VQModel
from ldm_lab.data.latents import LatentCache
from ldm_lab.metrics import own
from ldm_lab.tools.evaluate.evaluate import evaluate, evaluate_autoencoder
from ldm_lab.training.callbacks.encode import check_room
from ldm_lab.utils.images import save_png
from ldm_lab.utils.writing import SaveError, replacing, require_writable, write_json
from tests.helpers import GOLDEN
from tests.tools.evaluate.requests import request
from tests.trained import copy, snapshot, train, undisturbed

MODEL = GOLDEN / "diffusers" / "ldm_tiny"
REFUSALS = (errno.EROFS, errno.EACCES, errno.EPERM)


def is_inside(path, folder):
    return isinstance(path, (str, os.PathLike)) and Path(path).absolute().is_relative_to(folder)


@contextlib.contextmanager
def read_only(folder, number=errno.EROFS):
    """The disk refuses to change what lies in `folder`: this process may be one that may write everywhere."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("open", "mkdir", "unlink", "replace", "rename", "chmod"):
            patch.setattr(os, name, _refusing(getattr(os, name), name, folder, number))
        yield


def _refusing(real, name, folder, number):
    def refuse(path, *arguments, **keywords):
        writes = name != "open" or arguments[0] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writes and is_inside(path, folder):
            raise OSError(number, os.strerror(number), str(path))
        return real(path, *arguments, **keywords)

    return refuse


def test_the_disk_of_these_tests_refuses(tmp_path):
    """The oracle of this file."""
    with read_only(tmp_path):
        for act in ((tmp_path / "new").mkdir, (tmp_path / "new").touch, lambda: tempfile.mkdtemp(dir=tmp_path)):
            with pytest.raises(OSError, match="Read-only file system"):
                act()


# One file.


@pytest.mark.parametrize("number", REFUSALS)
def test_a_refusal_is_said_and_not_hidden_by_another(tmp_path, number):
    (tmp_path / "file").write_text("old")
    with read_only(tmp_path, number):
        for path in (tmp_path / "file", tmp_path / "new/folder/file"):
            with pytest.raises(SaveError) as error, replacing(path):
                pytest.fail("nothing can be written here")
            reason = os.strerror(number)
            assert str(error.value) == f"{path}: cannot be written: {reason} ({tmp_path}); choose another place"
    assert snapshot(tmp_path).keys() == {Path("file")}


@pytest.mark.parametrize("write", [write_json, lambda path, _: save_png(None, path)])
@pytest.mark.parametrize("name", ["file/x.json", "file/deeper/x.json"])
def test_a_file_where_a_folder_should_be(tmp_path, write, name):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SaveError) as error:
        write(tmp_path / name, {})
    line = f"{tmp_path / name}: cannot be written: {tmp_path}/file is no folder; choose another place"
    assert str(error.value) == line
    with pytest.raises(SaveError, match="file is no folder"):
        VQModel.from_pretrained(MODEL / "vqvae").save_pretrained(tmp_path / "file")


def test_a_folder_in_the_place_of_a_file(tmp_path):
    (tmp_path / "x.json").mkdir()
    with pytest.raises(SaveError, match=r"x\.json: cannot be written: Is a directory"):
        write_json(tmp_path / "x.json", {})
    assert snapshot(tmp_path).keys() == {Path("x.json")}


def test_a_folder_that_is_not_there_is_made(tmp_path):
    write_json(tmp_path / "new/folder/x.json", {})
    assert snapshot(tmp_path).keys() == {Path("new"), Path("new/folder"), Path("new/folder/x.json")}


@pytest.mark.parametrize("name", ["", "new", "new/folder"])
@pytest.mark.parametrize("number", REFUSALS)
def test_a_place_is_tried_without_a_trace(tmp_path, name, number):
    require_writable(tmp_path / name, "key=")
    assert snapshot(tmp_path) == {}
    with read_only(tmp_path, number), pytest.raises(SaveError) as error:
        require_writable(tmp_path / name, "key=")
    reason = f"{tmp_path / name} cannot be written: {os.strerror(number)} ({tmp_path})"
    assert str(error.value) == f"key= must name another place: {reason}"


# Commands.


@pytest.fixture
def in_the_way(tmp_path):
    (tmp_path / "file").write_text("in the way")
    return tmp_path / "file"


@pytest.fixture
def model(tmp_path):
    return shutil.copytree(MODEL, tmp_path / "mount/model", copy_function=shutil.copyfile)


def draw(model, *settings):
    sample.job([f"ckpt={model}", "num_samples=1", "sampler.steps=1", "trainer=cpu", *settings])


def test_samples_of_a_model_where_nothing_can_be_written(model, tmp_path):
    with read_only(model.parent):
        with pytest.raises(SaveError, match=rf"^output= must name another place: {model}/samples/.*Read-only") as error:
            draw(model)
        assert "\n" not in str(error.value)
        draw(model, f"output={tmp_path / 'here'}")
    assert (tmp_path / "here/images/000000.png").is_file()
    assert not (model / "samples").exists()


def test_samples_where_a_file_is(in_the_way):
    for place in (in_the_way, in_the_way / "samples"):
        with pytest.raises(SaveError, match=rf"^output= must name another place: {place} .*{in_the_way} is no folder"):
            draw(MODEL, f"output={place}")
    assert in_the_way.read_text() == "in the way"


@pytest.mark.parametrize("command", [(), ("plan=true",)])
def test_runs_where_nothing_can_be_written(in_the_way, tmp_path, command):
    settings = ("experiment=celebahq/autoencoder", *command)
    for folder in (in_the_way, in_the_way / "runs"):
        with pytest.raises(SaveError, match=rf"^paths.runs= must name another place: .*{in_the_way} is no folder"):
            train(folder, *settings)
    (tmp_path / "mount").mkdir()
    with read_only(tmp_path / "mount"), pytest.raises(SaveError, match=r"^paths.runs= must .*: Read-only file system"):
        train(tmp_path / "mount/runs", *settings)


def test_a_finished_run_may_lie_where_nothing_can_be_written(tiny_runs, tmp_path, capsys):
    runs = copy(tiny_runs, tmp_path / "runs")
    with read_only(runs):
        train(runs, "experiment=celebahq", f"paths.cache={runs}/cache")
    assert capsys.readouterr().out.count("nothing to do") == 2


def test_a_cache_where_nothing_can_be_written_is_refused_before_stage_1(in_the_way, tmp_path):
    line = rf"^paths.cache= must name another place: .*{in_the_way} is no folder"
    with pytest.raises(SaveError, match=line):
        train(tmp_path / "runs", "experiment=celebahq", f"paths.cache={in_the_way}")
    assert not (tmp_path / "runs").exists()


def test_a_cache_that_lacks_nothing_may_lie_where_nothing_can_be_written(tmp_path):
    cache = LatentCache(tmp_path / "latents", {}, count=3, shape=(1, 2, 4, 4), dtype="float32")
    with read_only(tmp_path), pytest.raises(SaveError, match=r"^paths.cache= must name another place: .*Read-only"):
        check_room(cache)
    cache.folder.mkdir(parents=True)
    for shard in cache.shards:
        cache.path(shard).touch()
    with read_only(tmp_path):
        check_room(cache)


@pytest.fixture
def quick(monkeypatch):
    """Features that have learned next to nothing do here."""
    monkeypatch.setattr(own, "STEPS", 2)
    with undisturbed():
        yield


def test_evaluation_where_nothing_can_be_written(tiny_runs, tmp_path, quick):
    runs, cache = copy(tiny_runs, tmp_path / "runs"), tmp_path / "cache"
    wanted = {"num_samples": 6, "bootstrap": 0}
    with read_only(runs):
        for act in (evaluate, evaluate_autoencoder):
            with pytest.raises(SaveError, match=r"^--output must name another place: .*Read-only file system"):
                act(request(runs / "celebahq", cache, **wanted))
        with read_only(cache), pytest.raises(SaveError, match=r"^(paths\.cache=|--cache) must name another place"):
            evaluate(request(runs / "celebahq", cache, output=tmp_path / "out", **wanted))
        first = evaluate(request(runs / "celebahq", cache, output=tmp_path / "out", **wanted))
    assert len(list((tmp_path / "out").glob("*.json"))) == 1
    assert len(list((tmp_path / "out/samples").glob("*/images/*.png"))) == 6
    with read_only(cache):  # it lacks nothing now
        assert evaluate(request(runs / "celebahq", cache, **wanted)) == first
    assert len(list((runs / "celebahq/samples").glob("*/images/*.png"))) == 6

"""Which state of a model a source names: its result, its newest state, a snapshot."""

import json

import pytest

from ldm_lab.checkpoints import checkpoint, locate
from ldm_lab.checkpoints.locate import State, find
from ldm_lab.pipeline import LDMPipeline
from ldm_lab.utils.reading import LoadError
from tests.helpers import GOLDEN

MODEL = GOLDEN / "diffusers" / "ldm_tiny"


def save(path, images):
    """A checkpoint without tensors."""
    entry = {"stage": "diffusion", "images_seen": images, "configs": {}, "prefixes": {}}
    checkpoint.save({"state_dict": {}, checkpoint.ENTRY: entry}, path)
    return path


def mark(folder, name=locate.INDEX):
    """A folder that looks like a result."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).touch()
    return folder


def write_status(stage, finished):
    stage.mkdir(parents=True, exist_ok=True)
    (stage / checkpoint.STATUS).write_text(json.dumps({"finished": finished}))


@pytest.fixture
def run(tmp_path):
    """A run whose second stage has a state at 100,000 images and two snapshots."""
    run = tmp_path / "run"
    save(run / "diffusion/checkpoints/last.ckpt", 100_000)
    for images in (50_000, 100_000):
        mark(run / f"diffusion/snapshots/{images:09d}")
    write_status(run / "diffusion", finished=False)
    return run


def test_a_folder_or_file_is_itself(run):
    assert find(str(MODEL)) == State(MODEL, MODEL)
    last = run / "diffusion/checkpoints/last.ckpt"
    assert find(last) == State(last, last, 100_000)
    taken = run / "diffusion/snapshots/000050000"
    assert find(taken) == State(taken, taken, 50_000)


@pytest.mark.parametrize("stage", ["", "diffusion"])
def test_an_unfinished_run_is_its_newest_state(run, stage):
    source = run / stage
    assert find(source) == State(source, run / "diffusion/checkpoints/last.ckpt", 100_000)
    ahead = mark(run / "diffusion/snapshots/000150000")  # the power went off before the next checkpoint
    assert find(source) == State(source, ahead, 150_000)
    half = run / "diffusion/snapshots/.000200000.new.tmp"
    half.mkdir()
    mark(half)
    assert find(source).path == ahead


def test_a_finished_run_is_its_result_until_it_goes_on(run):
    write_status(run / "diffusion", finished=True)
    final = mark(run / "diffusion/final")
    assert [find(source).path for source in (run, run / "diffusion")] == [final, final]
    mark(run)
    assert find(run) == State(run, run)
    write_status(run / "diffusion", finished=False)
    assert find(run).images_seen == 100_000
    (run / "diffusion" / checkpoint.STATUS).unlink()  # a pipeline folder from elsewhere
    assert find(run) == State(run, run)


def test_a_snapshot_by_its_count(run):
    for text in ("100k", "100000", "0.1M", "99.1k", "101k"):  # a step ends after the multiple it crosses
        assert find(f"{run}@{text}") == State(run, run / "diffusion/snapshots/000100000", 100_000)
    assert find(f"{run}/diffusion@50k").images_seen == 50_000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("98k", "@98k: there is no such snapshot; there are 50k, 100k"),
        ("2M", "@2M: there is no such snapshot; there are 50k, 100k"),
        ("new", "@new: 'new' is no number of images such as 2M; there are 50k, 100k"),
        ("3ep", "@3ep: '3ep' is no number of images such as 2M; there are 50k, 100k"),
    ],
)
def test_a_snapshot_that_is_not_there(run, text, message):
    with pytest.raises(LoadError) as error:
        find(f"{run}@{text}")
    assert str(error.value) == f"{run}{message}"


def test_a_run_without_snapshots_says_how_to_take_them(tmp_path):
    save(tmp_path / "diffusion/checkpoints/last.ckpt", 8)
    with pytest.raises(LoadError, match=r"@2M: .* has no snapshots; train.py snapshots=1M takes one every million"):
        find(f"{tmp_path}@2M")


def test_a_path_may_hold_an_at_sign(run, tmp_path):
    home = run.rename(tmp_path / "me@home")
    assert find(home).images_seen == 100_000
    assert find(f"{home}@50k").images_seen == 50_000
    with pytest.raises(LoadError, match="me@work: no such file or folder"):
        find(tmp_path / "me@work")
    with pytest.raises(LoadError, match="you@2M: no such file or folder"):
        find(tmp_path / "you@2M")


def test_nothing_to_find(tmp_path):
    with pytest.raises(LoadError, match=r"no pipeline \(model_index.json\) and no diffusion checkpoint"):
        find(mark(tmp_path / "autoencoder/final", "config.json"))
    with pytest.raises(LoadError, match="elsewhere: no such file or folder"):
        find(tmp_path / "elsewhere")
    with pytest.raises(LoadError, match=r"^s3://\*\*\*@host/run: models are read from a folder of this machine"):
        find("s3://me:secret@host/run")


def test_a_first_stage_is_found_likewise(tmp_path):
    stage = tmp_path / "autoencoder"
    last = save(stage / "checkpoints/last.ckpt", 8)
    final = mark(stage / "final", "config.json")
    assert [locate.search(source, "autoencoder").path for source in (tmp_path, stage, final)] == [final] * 3
    write_status(stage, finished=False)
    assert locate.search(tmp_path, "autoencoder") == State(tmp_path, last, 8)
    assert locate.search(tmp_path, "diffusion") is None


def test_a_pipeline_from_a_snapshot(tmp_path):
    LDMPipeline.from_pretrained(MODEL).save_pretrained(tmp_path / "diffusion/snapshots/000000008")
    assert LDMPipeline.from_pretrained(f"{tmp_path}@8").unet.num_parameters() > 0
    assert LDMPipeline.from_pretrained(tmp_path).unet.num_parameters() > 0

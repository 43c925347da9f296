"""A copy of a run in a store: an empty machine continues from there, bit for bit."""

import json
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from ldm_lab.checkpoints import checkpoint
from ldm_lab.runs.folder import RunFolder
from ldm_lab.training import mirror
from ldm_lab.training.mirror import Mirror
from ldm_lab.utils import stores
from ldm_lab.utils.errors import UserError
from ldm_lab.utils.reading import LoadError
from tests.data.pictures import save
from tests.helpers import contents
from tests.trained import train
from tests.training.test_resume import assert_same_training, interrupt


def write_state(folder, seen, size=1000):
    state = {"state_dict": {"w": torch.full((size,), float(seen))}}
    state["ldm_lab"] = {"stage": "autoencoder", "images_seen": seen, "configs": {}, "prefixes": {}}
    checkpoint.save(state, folder / "checkpoints/last.ckpt")
    (folder / "metrics.csv").write_text(f"images_seen\n{seen}\n")
    for name in ("checkpoints/previous.ckpt", ".hidden/x", "wandb/big", "samples/a.png", "config.yaml"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def visible(folder):
    left_out = ("previous.ckpt", ".hidden/x", "wandb/big")
    return {name: content for name, content in contents(folder).items() if not name.endswith(left_out)}


@pytest.fixture
def here(tmp_path):
    folder = tmp_path / "runs/x/autoencoder"
    write_state(folder, 16)
    return folder


@pytest.fixture
def there(tmp_path):
    return RunFolder(tmp_path / "elsewhere/x/autoencoder")


def config(root, run, resume="auto"):
    return {"paths": {"mirror": root, "stage": str(run.folder)}, "resume": resume}


def test_a_folder_comes_back_from_a_store(here, there, s3):
    root = "s3://photos/mirrored"
    kept = Mirror(root, RunFolder(here))
    kept.save()
    assert Mirror(root, there).restore()
    assert contents(there.folder) == visible(here)
    assert not Mirror(root, there).restore()  # it is as new
    before = s3.count("PUT")
    (here / "metrics.csv").write_text("longer")
    kept.save()
    assert s3.count("PUT") == before + 2  # the changed file and mirror.json
    assert len(s3.names("mirrored/x/autoencoder/files/")) == len(visible(here))
    write_state(there.folder, 32)
    assert not Mirror(root, there).restore()  # what is here is newer
    Mirror(root, there).save()
    assert Mirror(root, RunFolder(here)).restore()
    assert RunFolder(here).images_seen() == 32
    with pytest.raises(UserError, match=r"^resume=never, but s3://photos/mirrored/x/autoencoder holds this run: "):
        mirror.restore([config(root, there, "never")])


def test_a_missing_bucket_is_heard_of_at_once(there, s3):
    with pytest.raises(UserError, match=r"^paths\.mirror=s3://nowhere/m/x/autoencoder/started: no such bucket"):
        mirror.restore([config("s3://nowhere/m", there)])
    with pytest.raises(UserError, match=r"^gopher://x: no such kind of store"):
        mirror.restore([config("gopher://x", there)])


def test_a_store_that_fails_does_not_end_the_training(here, s3, monkeypatch, capsys):
    monkeypatch.setattr(stores, "PATIENCE", 0.1)
    kept = Mirror("s3://photos/failing", RunFolder(here))
    with s3.fault("busy"):
        kept.begin()
        assert kept._saving.acquire(timeout=20)
        kept._saving.release()
    assert "status 503, for 0 s" in (said := capsys.readouterr().out)
    assert said.count("training goes on, and the next checkpoint is tried") == 1
    kept.save()
    assert kept.manifest()["images_seen"] == 16


def test_a_corrupt_checkpoint_does_not_replace_a_good_copy(here, tmp_path, capsys):
    kept = Mirror(tmp_path.as_uri() + "/store", RunFolder(here))
    kept.save()
    content = bytearray((here / "checkpoints/last.ckpt").read_bytes())
    content[len(content) // 2] ^= 1
    (here / "checkpoints/last.ckpt").write_bytes(content)
    with pytest.raises(LoadError, match="corrupt"):
        Mirror(tmp_path.as_uri() + "/store", RunFolder(here)).save()
    assert kept.manifest()["images_seen"] == 16


@pytest.mark.parametrize("name", ["../evil", "/evil", "a/../../evil", ".hidden", ""])
def test_names_in_a_foreign_store_lead_nowhere_else(name, here, there, tmp_path):
    root = tmp_path.as_uri() + "/store"
    Mirror(root, RunFolder(here)).save()
    path = tmp_path / "store/x/autoencoder/mirror.json"
    content = json.loads(path.read_text())
    content["files"][name] = content["files"].pop("metrics.csv")
    path.write_text(json.dumps(content))
    with pytest.raises(LoadError, match="is no file of a stage"):
        Mirror(root, there).restore()
    assert not there.folder.exists()


def test_damaged_objects_are_not_taken(here, there, tmp_path):
    root = tmp_path.as_uri() + "/store"
    Mirror(root, RunFolder(here)).save()
    for path in (tmp_path / "store/x/autoencoder/files").iterdir():
        path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(LoadError, match="damaged; remove it and "):
        Mirror(root, there).restore()
    assert not there.has_state()


@pytest.mark.parametrize("at", ["upload", "manifest"])
def test_a_killed_copy_leaves_the_one_before(at, here, there, s3):
    root = f"s3://photos/killed_{at}"
    Mirror(root, RunFolder(here)).save()
    before = visible(here)
    write_state(here, 32)
    where = "mirror.json" if at == "manifest" else "/files/"
    s3.asked.clear()
    with s3.fault("slow", where=where, method="PUT"):
        child = multiprocessing.get_context("fork").Process(target=Mirror(root, RunFolder(here)).save)
        child.start()
        while not s3.count("PUT", where):
            assert child.is_alive()
            time.sleep(0.01)
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        assert Mirror(root, there).restore()
    assert contents(there.folder) == before
    Mirror(root, RunFolder(here)).save()
    assert Mirror(root, there).restore()
    assert there.images_seen() == 32


def test_a_run_that_moves_between_machines_ends_as_an_undisturbed_one(tmp_path, s3, capsys):
    """And between a store and a folder of the same images."""
    for n in range(24):
        save(tmp_path / "photos" / f"{n:02}.png", (10 * n, 255 - 10 * n, n), (32, 32 + n % 3), format="PNG")
    own = [f"data.root={tmp_path / 'photos'}", "experiment=avatars/autoencoder"]
    remote = [f"data.root={s3.put_folder(tmp_path / 'photos', 'moving_run')}", f"paths.cache={tmp_path / 'cache'}"]
    train(tmp_path / "whole", *own)
    place = ["paths.mirror=s3://photos/runs", own[1]]
    with pytest.raises(SystemExit):
        train(tmp_path / "moved", *place, *remote, *interrupt("autoencoder", 24))
    shutil.rmtree(tmp_path / "moved")
    train(tmp_path / "moved", *place, own[0])
    assert "comes from s3://photos/runs/avatars/autoencoder, at 32 images" in capsys.readouterr().out
    assert_same_training(tmp_path / "moved/avatars/autoencoder", tmp_path / "whole/avatars/autoencoder")
    shutil.rmtree(tmp_path / "moved")
    train(tmp_path / "moved", *place, own[0])  # a finished run comes back as a whole
    stage = Path("avatars/autoencoder")
    assert_same_training(tmp_path / "moved" / stage, tmp_path / "whole" / stage)
    assert RunFolder(tmp_path / "moved" / stage).status()["finished"]

"""Listing and pruning cached latents: only caches go, and only what they are made of."""

import os
import time

import pytest
import torch
from PIL import Image

from ldm_lab.data.images import FolderImages
from ldm_lab.data.latents import LatentCache
from ldm_lab.data.storage.copies import Copies
from ldm_lab.tools import cache as command
from tests.data.test_remote import forget

WHAT = {
    "autoencoder": {"class": "VQModel", "weights": "abcd"},
    "images": {"class": "FolderImages", "fingerprint": "0"},
    "transform": {"image_size": [16, 16]},
}


def make(root, count, **more):
    made = LatentCache(root / "latents", {**WHAT, **more}, count, (2, 3, 4, 4), "float16")
    made.open_folder()
    for shard in made.shards:
        made.write(shard, torch.zeros(len(made.indices(shard)), *made.shape), {})
    return made


def run(root, capsys, *flags):
    command.main([*flags, "--folder", str(root)])
    return capsys.readouterr().out


def test_caches_are_listed_with_what_they_are(tmp_path, capsys):
    old, new = make(tmp_path, 40), make(tmp_path, 20)
    os.utime(old.folder / "meta.json", (time.time() - 40 * 86400,) * 2)
    title, *lines = run(tmp_path, capsys).splitlines()
    assert title.startswith(f"{tmp_path}: 2 cache(s)")
    assert [line.split()[0] for line in lines] == [new.key, old.key]
    assert lines[1].endswith("used  40 day(s) ago  40 FolderImages of 16 x 16, mirrored too, float16, by VQModel abcd")
    lower = make(tmp_path, 30, precision="bfloat16")
    assert f"{lower.key} " in (line := run(tmp_path, capsys).splitlines()[1])
    assert line.endswith("30 FolderImages of 16 x 16, mirrored too, float16 encoded in bfloat16, by VQModel abcd")
    make(tmp_path, 50, precision="32-true")
    assert (
        run(tmp_path, capsys)
        .splitlines()[1]
        .endswith("50 FolderImages of 16 x 16, mirrored too, float16, by VQModel abcd")
    )
    assert "removed" in run(tmp_path, capsys, "--older-than", "30d")
    assert not old.folder.exists()
    assert new.missing() == []
    assert run(tmp_path / "nowhere", capsys).splitlines()[0].endswith("0 cache(s), 0.0 MB")


def test_only_what_a_cache_is_made_of_is_removed(tmp_path, capsys):
    made, other = make(tmp_path, 40), make(tmp_path, 20)
    strange = [made.folder / "mine.txt", tmp_path / "latents/notes/a.txt", tmp_path / "elsewhere/00000.safetensors"]
    for path in strange:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    link = tmp_path / "latents" / ("0" * 16)
    link.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"--prune \.\./elsewhere: .* has no cache of this key"):
        run(tmp_path, capsys, "--prune", "../elsewhere")
    assert f"removed: {made.key}" in run(tmp_path, capsys, "--prune", made.key)
    assert [path.name for path in made.folder.iterdir()] == ["mine.txt"]
    assert other.missing() == []
    run(tmp_path, capsys, "--all")
    assert not other.folder.exists()
    assert all(path.read_text() == "mine" for path in strange)
    assert link.is_symlink()


def test_copies_of_stores_are_listed_and_removed(tmp_path, capsys):
    """With their last use; foreign files stay."""
    (tmp_path / "photos").mkdir()
    for number in range(3):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"photos/{number}.png")

    def use():
        forget()  # as a new process
        images = FolderImages(f"file://{tmp_path}/photos", "train", 8, val_fraction=0.5, cache_dir=tmp_path)
        assert all(images[place] for place in range(len(images)))
        capsys.readouterr()

    use()
    folder = next((tmp_path / "stores").iterdir())
    copies = {path for path in folder.rglob("*") if path.is_file()}
    title, line = run(tmp_path, capsys).splitlines()
    assert title.startswith(f"{tmp_path}: 1 cache(s)")
    assert line.startswith(folder.name)
    assert line.endswith(f"used   0 day(s) ago  copies of file://{tmp_path}/photos")
    os.utime(folder / "source.txt", (time.time() - 40 * 86400,) * 2)
    use()
    assert run(tmp_path, capsys, "--older-than", "30d") == ""
    os.utime(folder / "source.txt", (time.time() - 40 * 86400,) * 2)
    for name in ("objects/mine/a.png", "objects/a.png", "archives/a.tar", "mine.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("mine")
    with Copies(folder).fetching() as mine:
        assert mine
        assert run(tmp_path, capsys, "--older-than", "30d").startswith(f"in use, left: {folder.name}")
    assert all(path.exists() for path in copies)
    assert run(tmp_path, capsys, "--verify") == ""
    assert run(tmp_path, capsys, "--older-than", "30d").startswith(f"removed: {folder.name}")
    assert not any(path.exists() for path in copies)
    left = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert left == {"objects/mine/a.png", "objects/a.png", "archives/a.tar", "mine.txt"}
    use()


def test_a_cache_that_is_being_filled_stays(tmp_path, capsys):
    made = make(tmp_path, 40)
    made.path(1).unlink()
    with made.claim(1) as mine:
        assert mine
        assert f"in use, left: {made.key}" in run(tmp_path, capsys, "--all")
    assert made.missing() == [1]
    assert "removed" in run(tmp_path, capsys, "--all")


@pytest.mark.parametrize("text", ["[]", "{", '{"transform": {"image_size": "x"}}', '{"shape": []}'])
def test_a_damaged_cache_is_listed_and_can_be_removed(tmp_path, capsys, text):
    made = make(tmp_path, 40)
    (made.folder / "meta.json").write_text(text)
    assert "damaged: no meta.json that says what it is" in run(tmp_path, capsys)
    run(tmp_path, capsys, "--prune", made.key)
    assert not made.folder.exists()


@pytest.mark.parametrize("age", ["30", "d", "1y", "-1d"])
def test_an_age_that_is_none_is_refused(tmp_path, capsys, age):
    with pytest.raises(ValueError, match=r"give hours, days or weeks"):
        run(tmp_path, capsys, f"--older-than={age}")


def test_one_flipped_bit_is_found(tmp_path, capsys):
    sound, hurt = make(tmp_path, 20), make(tmp_path, 40)
    assert "2 of 2 shards" in run(tmp_path, capsys, "--verify")
    data = bytearray(hurt.path(1).read_bytes())
    data[-5] ^= 1
    hurt.path(1).write_bytes(data)
    with pytest.raises(ValueError, match=rf"^damaged: {hurt.path(1)}; remove"):
        run(tmp_path, capsys, "--verify")
    said = capsys.readouterr().out
    assert f"{sound.key}  2 of 2" in said
    assert f"{hurt.key}  2 of 3" in said


@pytest.mark.parametrize("content", [b"", b"x" * 100])
def test_a_shard_that_is_none_is_damaged(tmp_path, capsys, content):
    made = make(tmp_path, 10)
    made.path(0).write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        run(tmp_path, capsys, "--verify")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_checksums_are_of_what_is_kept(tmp_path, capsys, dtype):
    made = LatentCache(tmp_path / "latents", WHAT, 3, (1, 3, 4, 4), dtype)
    made.open_folder()
    made.write(0, torch.randn(3, 1, 3, 4, 4), {})
    assert "1 of 1 shards" in run(tmp_path, capsys, "--verify")

"""Data sets in stores and sets of archives: the same data as their folder, faults, copies."""

import errno
import logging
import multiprocessing
import os
import pickle
import signal
import sys
import tarfile
import time
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from ldm_lab.data.images import FolderImages
from ldm_lab.data.storage import remote, shards
from ldm_lab.data.storage.copies import Copies, pack, unpack
from ldm_lab.data.storage.shards import expanded, open_files
from ldm_lab.utils import stores
from ldm_lab.utils.errors import UserError
from ldm_lab.utils.stores import StoreError
from ldm_lab.utils.terminal import said_once
from tests.stores import Pages, web

NAMES = [f"{part}/{n:02}.png" for part in ("a", "b c", "ü") for n in range(2)] + ["d.png", "notes.txt", ".hidden/x.png"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of noise."""
    folder = tmp_path_factory.mktemp("remote") / "photos"
    for n, name in enumerate(NAMES):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(n).integers(0, 256, (8 + n, 9, 3), np.uint8)
        Image.fromarray(noise).save(folder / name, "PNG")
    return folder


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Nobody waits too long, nothing is remembered from another test."""
    monkeypatch.setattr(stores, "PATIENCE", 20.0)
    said_once.clear()
    for cached in (remote._require_same, remote._find_once, shards._find_once, shards._indexed):
        cached.cache_clear()


def pack_files(folder, target, names, prefix="photos/"):
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.suffix == ".zip":
        with zipfile.ZipFile(target, "w") as archive:
            for name in names:
                archive.write(folder / name, prefix + name)
    else:
        with tarfile.open(target, "w") as archive:
            for name in names:
                archive.add(folder / name, prefix + name)
    return target


def pack_shards(photos, folder, ending):
    for n in range(3):
        pack_files(photos, folder / f"set-{n:02}.{ending}", NAMES[n::3])
    return f"set-{{00..02}}.{ending}"


def both(root, cache, **arguments):
    return [FolderImages(root, split, 8, val_fraction=0.4, cache_dir=cache, **arguments) for split in ("train", "val")]


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert one.names.tolist() == other.names.tolist()
        assert one.fingerprint() == other.fingerprint()
        items = one.__getitems__([(n, n) for n in range(len(one))])
        assert all(torch.equal(item["image"], other[n, n]["image"]) for n, item in enumerate(items))


def forget():
    """As a new process: nothing is held in memory."""
    for cached in (remote._find_once, shards._find_once, shards._indexed, remote._require_same):
        cached.cache_clear()


# --- the same data as a folder


@pytest.mark.parametrize("form", ["objects", "zip", "tar", "shards of tar", "shards of zip"])
def test_a_store_holds_the_same_data_set_as_its_folder(form, photos, tmp_path, s3):
    name, kind = form.replace(" ", "_"), form.split()[-1]
    if form == "objects":
        root = s3.put_folder(photos, name)
    elif form.startswith("shards"):
        pattern = pack_shards(photos, tmp_path / "x", kind)
        root = f"{s3.put_folder(tmp_path / 'x', name)}/{pattern}"
    else:
        pack_files(photos, tmp_path / "x" / f"all.{kind}", NAMES)
        root = f"{s3.put_folder(tmp_path / 'x', name)}/all.{kind}"
    own = both(photos, None)
    s3.asked.clear()
    assert_same(both(root, tmp_path / "cache"), own)
    assert s3.asked
    s3.asked.clear()
    forget()
    assert_same(both(root, tmp_path / "cache"), own)  # a later start, or another rank
    assert s3.asked == []
    forget()
    assert_same(both(root, tmp_path / "small", cache_limit=400), own)  # some by ranges, nothing or little is kept
    copies = [
        path for path in (tmp_path / "small").rglob("*") if path.is_file() and path.parent.name not in ("stores",)
    ]
    kept = sum(path.stat().st_size for path in copies if {"objects", "archives"} & set(path.parts))
    assert kept <= 400 + 4 * len(NAMES)


@pytest.mark.parametrize("ending", ["tar", "zip"])
def test_a_local_set_of_archives_is_its_folder(ending, photos, tmp_path):
    pattern = pack_shards(photos, tmp_path / "x", ending)
    images = both(tmp_path / "x" / pattern, None)
    assert_same(images, both(photos, None))
    assert set(images[0].groups(8).tolist()) == {0, 1, 2}
    assert both(photos, None)[0].groups(8) is None
    again = pickle.loads(pickle.dumps(images[0]))
    assert torch.equal(again[0]["image"], images[0][0]["image"])
    (tmp_path / "x" / f"set-01.{ending}").unlink()
    shards._local.cache_clear()
    with pytest.raises(UserError, match=r"1 of 3 archives are missing, such as .*set-01"):
        both(tmp_path / "x" / pattern, None)


def test_a_web_server_and_a_file_address(photos, tmp_path):
    pattern = pack_shards(photos, tmp_path / "x", "tar")
    pack_files(photos, tmp_path / "x" / "all.zip", NAMES)
    server = web(tmp_path / "x")
    own = both(photos, None)
    for name in ("all.zip", pattern, "all.zip?signature=secret"):
        assert_same(both(f"{server.endpoint}/{name}", tmp_path / name[:3]), own)
    assert_same(both(photos.as_uri(), tmp_path / "file"), own)
    with server.fault("gone"), pytest.raises(StoreError, match="no such bucket, container or object"):
        len(both(f"{server.endpoint}/none.zip", tmp_path / "none")[0])
    server.close()


def test_names_of_a_set_must_differ(photos, tmp_path):
    for n in range(2):
        pack_files(photos, tmp_path / f"s{n}.tar", NAMES[:2])
    with pytest.raises(UserError, match=r"a/00\.png is in .*s0\.tar and .*s1\.tar: the names"):
        len(both(tmp_path / "s{0..1}.tar", None)[0])


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a.tar", ["a.tar"]),
        ("a{08..10}", ["a08", "a09", "a10"]),
        ("a{8..10}", ["a8", "a9", "a10"]),
        ("{0..1}/{1..2}.zip", ["0/1.zip", "0/2.zip", "1/1.zip", "1/2.zip"]),
    ],
)
def test_braces(pattern, expected):
    assert expanded(pattern) == expected


@pytest.mark.parametrize(
    ("root", "message"),
    [
        ("ftp://x/y", "ftp://x/y: no such kind of store; there are s3, gs, az, http, https, file"),
        ("https://me:pw@x/y?sig=abc", "data.root=https://***@x/y?***: a web server lists no files"),
        ("s3://x/y.tar.gz", "data.root=s3://x/y.tar.gz: compressed"),
        ("s3://x/y.npy", "data.root=s3://x/y.npy: one array is read by memory map: copy it to a local folder"),
        ("s3://x/a{9..1}.tar", "data.root=s3://x/a{9..1}.tar: {9..1} must count upwards"),
        ("a{2..1}.tar", "data.root=a{2..1}.tar: {2..1} must count upwards"),
    ],
)
def test_addresses_that_cannot_be(root, message, tmp_path):
    with pytest.raises(UserError) as error:
        len(both(root, tmp_path)[0])
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"^paths.cache_limit=much: must be a size such as 200GB"):
        both(root, tmp_path, cache_limit="much")


def test_a_library_that_is_missing(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(
        UserError, match=r"^data.root=gs://...: gcsfs is not installed: pip install 'ldm_lab\[remote\]'$"
    ):
        len(both("gs://x/y", tmp_path)[0])


# --- faults


def test_what_another_try_cures_is_said_once(photos, tmp_path, s3, caplog, monkeypatch):
    monkeypatch.setattr(stores, "SLOW", 1.0)
    root = s3.put_folder(photos, "cured")
    with (
        s3.fault("busy", times=2, method="GET", where="/photos/"),
        s3.fault("cut", times=1, where="d.png"),
        s3.fault("slow", times=1, where="a/00.png"),
        caplog.at_level(logging.WARNING),
    ):
        assert_same(both(root, tmp_path), both(photos, None))
    (line,) = [record.getMessage() for record in caplog.records if record.name.startswith("ldm_lab")]
    assert line.endswith("trying again, each request for up to 20 s")


def test_a_store_that_keeps_failing_ends_in_one_line(photos, tmp_path, s3, monkeypatch):
    monkeypatch.setattr(stores, "PATIENCE", 0.5)
    root = s3.put_folder(photos, "failing")
    with s3.fault("busy"), pytest.raises(StoreError) as error:
        len(both(root, tmp_path)[0])
    assert str(error.value).startswith("data.root=s3://photos/failing: the store answers with status 503, for 0 s; the")


@pytest.mark.parametrize(
    ("root", "fault", "message"),
    [
        ("s3://photos/refused", "denied", "the store refuses these credentials, or there are none: set AWS_ACCESS_KEY"),
        ("s3://no-such-bucket/x", None, "no such bucket, container or object"),
        ("s3://photos/none.tar", None, "no such bucket, container or object"),
        ("s3://photos/empty", None, "no images in it; expected two or more files of type"),
    ],
)
def test_refusals_are_not_repeated(root, fault, message, tmp_path, s3):
    with s3.fault(fault, times=10**9 if fault else 0), pytest.raises(UserError) as error:
        len(both(root, tmp_path)[0])
    assert str(error.value).startswith(f"data.root={root}: {message}")
    assert "\n" not in str(error.value)
    assert len(s3.asked) <= 3


def test_objects_that_vanish_or_change(photos, tmp_path, s3):
    root = s3.put_folder(photos, "moving")
    train, val = both(root, tmp_path, on_error="skip")  # no fault of an image: it is not passed over
    first, second = (os.fsdecode(train.names[n]) for n in (0, 1))
    s3.remove(f"moving/{first}")
    s3.put(f"moving/{second}", (photos / second).read_bytes()[::-1])
    with pytest.raises(
        StoreError, match=rf"^data.root=s3://photos/moving/{first}: no such bucket, container or object$"
    ):
        train[0]
    with pytest.raises(
        StoreError, match=rf"^data.root=s3://photos/moving/{second}: changed since it was listed; to lis"
    ):
        train[1]
    train[2], val[0]


def test_an_archive_that_changes(photos, tmp_path, s3):
    pack_files(photos, tmp_path / "x" / "all.tar", NAMES)
    root = f"{s3.put_folder(tmp_path / 'x', 'changing')}/all.tar"
    images = both(root, tmp_path / "cache", cache_limit=10)[0]
    assert images[0]["image"].shape == (3, 8, 8)
    pack_files(photos, tmp_path / "x" / "all.tar", NAMES[:4])
    s3.put_folder(tmp_path / "x", "changing")
    remote._require_same.cache_clear()
    with pytest.raises(StoreError, match=r"all\.tar: changed since it was listed"):
        images[0]


def test_a_full_disk_costs_copies_not_the_run(photos, tmp_path, s3, monkeypatch, caplog):
    root = s3.put_folder(photos, "full")
    images = both(root, tmp_path)
    len(images[0])
    replace = os.replace

    def refuse(source, target):
        if "objects" in str(target) or "archives" in str(target):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with caplog.at_level(logging.WARNING):
        assert_same(images, both(photos, None))
    assert sum("No space left on device: images come from the store each time; free" in m for m in caplog.messages) == 1
    assert not list(tmp_path.rglob("*.tmp"))
    pack_files(photos, tmp_path / "x" / "full.tar", NAMES)
    s3.put_folder(tmp_path / "x", "full")
    with pytest.raises(UserError, match=r"No space left on device.*paths\.cache_limit= below the free space$"):
        len(both("s3://photos/full/full.tar", tmp_path)[0])


def test_a_damaged_copy_is_fetched_again(photos, tmp_path, s3):
    root = s3.put_folder(photos, "damaged")
    images = both(root, tmp_path)
    assert_same(images, both(photos, None))
    for path in (tmp_path / "stores").rglob("objects/*/*"):
        path.write_bytes(path.read_bytes()[:-3] + b"abc")
    (next((tmp_path / "stores").rglob("index.npz"))).write_bytes(b"PK half a file")
    forget()
    s3.asked.clear()
    assert_same(both(root, tmp_path), both(photos, None))
    assert s3.count("GET", ".png") == len(NAMES) - 2


def listed(*arguments):
    stores.PIECE = 2**12
    len(both(*arguments)[0])


def test_a_killed_download_leaves_nothing_that_is_used(photos, tmp_path, s3):
    noise = np.random.default_rng(0).integers(0, 256, (120, 120, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "big.png")
    target = pack_files(photos, tmp_path / "x" / "all.tar", NAMES)
    with tarfile.open(target, "a") as archive:
        archive.add(tmp_path / "big.png", "photos/big.png")
    root = f"{s3.put_folder(tmp_path / 'x', 'killed')}/all.tar"
    child = multiprocessing.get_context("fork").Process(target=listed, args=(root, tmp_path / "cache"))
    child.start()
    while s3.count("GET", "all.tar") < 4:  # of a dozen
        assert child.is_alive()
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert child.exitcode == -signal.SIGKILL
    left = {path.name[-4:] for path in (tmp_path / "cache").rglob("archives/*")}
    assert left <= {".tmp", "lock"}
    images = both(root, tmp_path / "cache")
    assert torch.equal(images[0][0]["image"], both(photos, None)[0][0]["image"])
    assert sum(map(len, images)) == len(NAMES) - 1


def test_workers_share_the_copies(photos, tmp_path, s3):
    root = s3.put_folder(photos, "shared")
    images = both(root, tmp_path)[0]
    alone = torch.stack([images[n]["image"] for n in range(len(images))])
    for path in (tmp_path / "stores").rglob("objects/*/*"):
        path.unlink()
    loader = DataLoader(images, batch_size=2, num_workers=2, multiprocessing_context="fork")
    assert torch.equal(torch.cat([batch["image"] for batch in loader]), alone)
    s3.asked.clear()
    assert torch.equal(torch.stack([images[n]["image"] for n in range(len(images))]), alone)
    assert s3.asked == []


def test_reading_shard_by_shard_keeps_a_window(photos, tmp_path, s3):
    pattern = pack_shards(photos, tmp_path / "x", "tar")
    root = f"{s3.put_folder(tmp_path / 'x', 'window')}/{pattern}"
    size = max(path.stat().st_size for path in (tmp_path / "x").iterdir())
    files = open_files(root, tmp_path / "cache", 2 * size)
    members = list(files.members())
    files.require_room(1)
    with pytest.raises(
        UserError, match=rf"^paths\.cache_limit={2 * size}: data\.shard_window=2 may need [\d,]+ bytes, "
    ):
        files.require_room(2)
    for number in (2, 0, 1):
        wanted = [member for member in members if member[1][0] == number]
        files.ahead(wanted, stream=True)
        with remote_busy():
            assert files.archives[number].root.copy.exists()
        there = [archive.root.copy.exists() for archive in files.archives]
        assert sum(there) <= 2
        s3.asked.clear()
        for name, place in wanted:
            assert files.read(name, place) == (photos / name).read_bytes()
        assert s3.asked == []


class remote_busy:  # noqa: N801
    """Waits until the copying in the background has ended."""

    def __enter__(self):
        assert shards._busy(os.getpid()).acquire(timeout=20)

    def __exit__(self, *_):
        shards._busy(os.getpid()).release()


def test_names_are_packed():
    names = [b"a", b"", "ü".encode(), b"x" * 300]
    assert unpack(pack(names)) == names
    assert unpack(pack([])) == []
    assert Copies(None, 10).fitting(np.array([4, 5, 2, 1])).tolist() == [True, True, False, False]


def test_ranks_that_start_together_list_once(photos, tmp_path, s3):
    root = s3.put_folder(photos, "together")
    s3.asked.clear()
    ranks = [multiprocessing.get_context("fork").Process(target=listed, args=(root, tmp_path)) for _ in range(3)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0, 0, 0]
    assert len(s3.asked) == 1


@pytest.mark.soak
def test_a_hundred_thousand_objects_are_listed_once(tmp_path, s3, monkeypatch):
    server = Pages(10**5)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
    stores._file_system.cache_clear()
    with server.fault("busy", times=3):
        images = both("s3://photos/many", tmp_path)
        fingerprint = images[0].fingerprint()
    assert sum(map(len, images)) == 10**5
    assert len(server.asked) == 100 + 3
    forget()
    server.asked.clear()
    assert both("s3://photos/many", tmp_path)[0].fingerprint() == fingerprint
    assert server.asked == []
    server.close()
    stores._file_system.cache_clear()

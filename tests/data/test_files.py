"""Folders and archives: what is found in them, and what is refused."""

import io
import os
import pickle
import shutil
import stat
import struct
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from ldm_lab.data.decoding.pictures import EXTENSIONS
from ldm_lab.data.drawn import drawn_or_folder
from ldm_lab.data.images import FolderImages, ImageError
from ldm_lab.data.storage import archives
from ldm_lab.data.storage.archives import TarArchive, ZipArchive, open_root
from ldm_lab.data.storage.files import Folder
from tests.data.pictures import save

NAMES = ["a.png", "b/c.png", "b/deep/er/d.JPG", "ünï/çødé 猫.webp", f"{'long' * 40}/e.png", "notes.txt"]


@pytest.fixture
def photos(tmp_path):
    """A folder of images of different sizes and colours."""
    folder = tmp_path / "photos"
    for n, name in enumerate(NAMES):
        save(folder / name, color=(40 * n, 255 - 40 * n, n), size=(8 + n, 9), format="PNG")
    return folder


def pack_zip(folder, prefix="", compression=zipfile.ZIP_STORED):
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w", compression) as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, f"{prefix}{file.relative_to(folder)}")
    return path


def pack_tar(folder, prefix="", layout=tarfile.PAX_FORMAT):
    path = folder.with_suffix(".tar")
    with tarfile.open(path, "w", format=layout) as archive:
        archive.add(folder, prefix or ".")
    return path


PACKERS = {
    "zip": pack_zip,
    "zip, of the folder itself": lambda folder: pack_zip(folder, "photos/"),
    "zip, deflated": lambda folder: pack_zip(folder, "", zipfile.ZIP_DEFLATED),
    "tar": pack_tar,
    "tar, of the folder itself": lambda folder: pack_tar(folder, "photos"),
    "tar, GNU": lambda folder: pack_tar(folder, "photos", tarfile.GNU_FORMAT),
    "by shutil, zip": lambda folder: shutil.make_archive(str(folder), "zip", folder),
    "by shutil, tar": lambda folder: shutil.make_archive(str(folder), "tar", folder),
}


def members(root):
    return sorted(name for name, _ in open_root(root).members())


def both(root, **arguments):
    return [FolderImages(root, split, 8, val_fraction=0.4, **arguments) for split in ("train", "val")]


def add(tar, name, content=b"", **fields):
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    for key, value in fields.items():
        setattr(entry, key, value)
    tar.addfile(entry, io.BytesIO(content))


# --- an archive is its folder


@pytest.mark.parametrize("packer", PACKERS)
def test_an_archive_is_the_same_data_set_as_its_folder(photos, packer):
    archive = PACKERS[packer](photos)
    for own, packed in zip(both(photos), both(archive), strict=True):
        assert own.names.tolist() == packed.names.tolist()
        assert own.fingerprint() == packed.fingerprint()
        for index in range(len(own)):
            assert torch.equal(own[index]["image"], packed[index]["image"])


def test_a_fingerprint_follows_the_members(photos):
    """The oracle of the test above: other content, another fingerprint."""
    before = [images.fingerprint() for images in both(pack_zip(photos))]
    save(photos / "a.png", size=(50, 50))
    assert before != [images.fingerprint() for images in both(pack_zip(photos))]


@pytest.mark.parametrize(("pack", "start"), [(pack_zip, "fork"), (pack_tar, "fork"), (pack_zip, "spawn")])
def test_workers_read_an_archive_side_by_side(tmp_path, pack, start):
    (tmp_path / "photos").mkdir()
    for n in range(24):
        noise = np.random.default_rng(n).integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / "photos" / f"{n:02}.png")
    images = both(pack(tmp_path / "photos"))[0]
    alone = torch.stack([images[index]["image"] for index in range(len(images))])
    loader = DataLoader(images, batch_size=1, num_workers=2 if start == "fork" else 1, multiprocessing_context=start)
    assert torch.equal(torch.cat([batch["image"] for batch in loader]), alone)


@pytest.mark.parametrize("pack", [shutil.copytree, pack_zip, pack_tar])
def test_a_data_set_can_be_pickled(photos, tmp_path, pack):
    root = pack(photos, tmp_path / "copy") if pack is shutil.copytree else pack(photos)
    for images in both(root):
        len(images)
        again = pickle.loads(pickle.dumps(images))
        assert torch.equal(again[0]["image"], images[0]["image"])
        assert len(pickle.dumps(images)) < 10_000


@pytest.mark.parametrize("pack", [pack_zip, pack_tar])
def test_an_archive_that_changes_is_listed_again(photos, pack):
    archive = pack(photos)
    first = len(both(archive)[0])
    for n in range(10):
        save(photos / f"new{n}.png")
    os.utime(pack(photos), ns=(1, 1))
    assert len(both(archive)[0]) > first


def test_debug_takes_archives_and_the_options_of_folders(photos):
    images = drawn_or_folder(pack_tar(photos), "train", [8, 16], val_fraction=0.4, flip=True, on_error="skip")
    assert images[0]["image"].shape == (3, 8, 16)
    assert (images.flip, images.on_error) == (True, "skip")
    assert drawn_or_folder(None, "train", 8, flip=True)[0]["image"].shape == (3, 8, 8)


# --- what is found


def test_finds_every_kind_at_every_depth(tmp_path):
    names = ["a.jpg", "b.JPEG", "deep/er/c.PNG", "deep/d.webp", "e.gif", "f.TIF", "g.tiff", "ünï/çødé 猫.Bmp"]
    for name in names:
        save(tmp_path / name)
    for name in ["notes.txt", "e.jpg.part", ".hidden.png", ".thumbnails/f.png", "deep/._a.jpg", "__MACOSX/x.png"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert members(tmp_path) == sorted([*names, "notes.txt", "e.jpg.part"])
    sets = both(tmp_path)
    assert sorted(os.fsdecode(name) for images in sets for name in images.names) == sorted(names)
    assert all(images[i]["image"].shape == (3, 8, 8) for images in sets for i in range(len(images)))


def test_links_are_followed_but_not_in_circles(tmp_path):
    save(tmp_path / "root" / "a.png")
    save(tmp_path / "elsewhere" / "b.png")
    (tmp_path / "root" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root" / "circle").symlink_to(tmp_path / "root")
    (tmp_path / "root" / "broken.png").symlink_to(tmp_path / "nowhere.png")
    # A link that leads nowhere is an image that cannot be read, for `data.on_error` to decide.
    assert members(tmp_path / "root") == ["a.png", "broken.png", "linked/b.png"]


def test_junk_hidden_files_and_names_that_lead_outside_are_passed_over(tmp_path):
    junk = [
        "__MACOSX/photos/._a.png",
        "photos/.DS_Store",
        "photos/.trash/c.png",
        "../evil.png",
        "photos/../../evil.png",
    ]
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive, tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name in ["photos/a.png", "photos/b.png", *junk]:
            archive.writestr(name, b"content")
            add(tar, name, b"content")
    assert members(tmp_path / "x.zip") == members(tmp_path / "x.tar") == ["a.png", "b.png"]


def test_absolute_names_are_names(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        add(tar, "/etc/a.png", b"one")
        add(tar, "/etc/b.png", b"two")
    archive = open_root(tmp_path / "x.tar")
    assert {name: archive.read(name, place) for name, place in archive.members()} == {
        "etc/a.png": b"one",
        "etc/b.png": b"two",
    }


def test_links_and_devices_in_archives_are_left_out(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        add(tar, "a.png", b"content")
        add(tar, "link.png", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add(tar, "hard.png", type=tarfile.LNKTYPE, linkname="a.png")
        add(tar, "pipe.png", type=tarfile.FIFOTYPE)
    link = zipfile.ZipInfo("link.png")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("a.png", b"content")
        archive.writestr(link, "/etc/passwd")
    assert members(tmp_path / "x.tar") == members(tmp_path / "x.zip") == ["a.png"]


def test_of_two_members_of_one_name_the_last_counts(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for content in (b"old", b"new!"):
            add(tar, "a.png", content)
            add(tar, "b.png", content)
    archive = open_root(tmp_path / "x.tar")
    names, places, _ = archive.find((".png",))
    assert names.tolist() == [b"a.png", b"b.png"]
    assert archive.read("a.png", tuple(places[0].tolist())) == b"new!"


def test_a_tar_that_ends_with_a_zip_is_a_tar(photos, tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(pack_zip(photos), "photos.zip")
        add(tar, "a.png")
    assert isinstance(open_root(tmp_path / "x.tar"), TarArchive)
    (tmp_path / "x.tar").rename(tmp_path / "x.zip")
    assert isinstance(open_root(tmp_path / "x.zip"), TarArchive)
    pack_zip(photos).rename(tmp_path / "y.tar")
    assert isinstance(open_root(tmp_path / "y.tar"), ZipArchive)
    assert isinstance(open_root(photos), Folder)


# --- what is refused: one line


def refused(root):
    """The message of the error that a root ends with."""
    with pytest.raises(ValueError) as error:
        len(FolderImages(root, "train", 8))
    message = str(error.value)
    assert message.startswith("data.root")
    assert "\n" not in message
    return message


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
def test_compressed_tars(photos, kind):
    path = photos.with_suffix(f".tar.{kind}")
    with tarfile.open(path, f"w:{kind}") as archive:
        archive.add(photos, "photos")
    assert refused(path).endswith("unpack it, or pack it again as a plain .tar or .zip")


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_zip_compression_of_other_kinds(photos, method):
    assert f"is compressed by method {method}; pack it again" in refused(pack_zip(photos, "", method))


def test_encrypted_zip(photos):
    path = pack_zip(photos)
    data = bytearray(path.read_bytes())
    at = data.index(b"PK\1\2")  # the first entry of the central directory
    data[at + 8] |= 1
    path.write_bytes(data)
    assert "a.png is encrypted" in refused(path)


@pytest.mark.parametrize("part", [0.01, 0.5, 0.99])
def test_archives_cut_short(photos, part):
    for path in (pack_zip(photos), pack_tar(photos)):
        data = path.read_bytes().rstrip(b"\0")  # without what fills up a tar
        path.write_bytes(data[: int(part * len(data))])
        assert "archive" in refused(path)


def test_a_tar_with_a_damaged_entry(photos):
    path = pack_tar(photos)
    with tarfile.open(path) as archive:
        offset = archive.getmembers()[4].offset
    data = bytearray(path.read_bytes())
    data[offset : offset + 512] = os.urandom(512)
    path.write_bytes(data)
    assert refused(path).endswith(f"this tar archive cannot be read: no entry at byte {offset:,}")


@pytest.mark.parametrize("pack", [pack_zip, pack_tar])
def test_a_member_cut_or_changed_after_the_listing(photos, pack):
    path = pack(photos)
    images = both(path)[0]
    len(images)
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ImageError, match=r"photos\.(zip|tar)/.*: cannot be read: (damaged|cut short) in the archive$"):
        images.read(0)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_damaged_content_of_a_zip(photos, method):
    path = pack_zip(photos, "", method)
    entry = next(place for name, place in open_root(path).members() if name == "a.png")
    data = bytearray(path.read_bytes())
    middle = entry[0] + 30 + len("a.png") + entry[1] // 2
    data[middle] ^= 0xFF
    path.write_bytes(data)
    (images,) = (images for images in both(path) if b"a.png" in images.names.tolist())
    with pytest.raises(ImageError, match=r"photos\.zip/a\.png: cannot be read: "):
        images.read(images.names.tolist().index(b"a.png"))


def test_a_bomb_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "LARGEST", 2**20)
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("a.png", "b.png"):
            archive.writestr(name, bytes(2**20 + 1))
    images = FolderImages(tmp_path / "x.zip", "train", 8)
    with pytest.raises(ImageError, match=r"1,048,577 bytes, more than the 1,048,576 that an image may have$"):
        images.read(0)


def test_a_bomb_that_denies_its_size(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", bytes(2**20))
        archive.writestr("b.png", bytes(2**20))
    data = (tmp_path / "x.zip").read_bytes()
    (tmp_path / "x.zip").write_bytes(data.replace(struct.pack("<I", 2**20), struct.pack("<I", 10)))
    archive = open_root(tmp_path / "x.zip")
    for name, place in archive.members():
        with pytest.raises(ValueError, match="damaged in the archive"):
            archive.read(name, place)


@pytest.mark.parametrize("root", [None, "", "???"])
def test_unset_root(root):
    assert "is not set" in refused(root)
    assert "data.root=<folder>" in refused(root)


def test_missing_root_and_other_files(tmp_path):
    assert "nowhere: no such folder or archive" in refused(tmp_path / "nowhere")
    assert "a.png: this is a file" in refused(save(tmp_path / "a.png"))
    (tmp_path / "empty.zip").write_bytes(b"")
    assert "this is a file, and not a whole zip or tar archive" in refused(tmp_path / "empty.zip")
    assert "no images" in refused(pack_zip(tmp_path / "nothing"))


def test_a_folder_without_images_says_what_it_holds(tmp_path):
    wanted = f"expected two or more files of type {', '.join(ending[1:] for ending in (*EXTENSIONS, '.npy'))}"
    assert refused(tmp_path) == f"data.root={tmp_path}: no images in it; {wanted}"
    for n in range(1200):
        (tmp_path / f"{n}.xyz").touch()
    (tmp_path / "README").touch()
    found = "no images in it, but 1,200 .xyz files and 1 without an ending"
    assert refused(tmp_path) == f"data.root={tmp_path}: {found}; {wanted}"
    save(tmp_path / "only.png")
    assert refused(tmp_path) == f"data.root={tmp_path}: one image in it; {wanted}"


def test_a_folder_of_archives_says_to_name_one(photos, tmp_path):
    shards = tmp_path / "shards"
    shards.mkdir()
    shutil.copy(pack_tar(photos), shards / "1.tar")
    shutil.copy(pack_zip(photos), shards / "0.zip")
    assert f"no images in it, but 2 archive(s): name one of them, data.root={shards / '0.zip'};" in refused(shards)

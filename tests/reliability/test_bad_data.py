"""Folders with many files that cannot be used: trained on with `data.on_error=skip`, refused by name with `raise`."""

import re
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from ldm_lab.data.images import FolderImages, ImageError
from ldm_lab.data.sampler import permutation
from tests.reliability import kills
from tests.reliability.commands import TWO
from tests.trained import SMALL, metrics, train

STAGE = "celebahq/autoencoder"
TRAINING = (
    f"experiment={STAGE}",
    SMALL,
    "debug=tiny",
    "logger=csv",
    "plugins=[tests]",
    "trainer.log_every_n_steps=1000",
)
HALVES = ("data.global_batch_size=40", "data.val_batch_size=40")


def header(width, height):
    """A PNG that claims to be of that size, and ends after saying so."""
    content = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + content + struct.pack(">I", zlib.crc32(content))


def rewrite(change):
    """A way to spoil a file: what it holds -> what it shall hold."""
    return lambda path: path.write_bytes(change(path.read_bytes()))


def put(make):
    """A way to spoil a file: something else takes its place."""

    def replace(path):
        path.unlink()
        make(path)

    return replace


BAD = {
    "truncated": rewrite(lambda content: content[: len(content) // 2]),
    "empty": rewrite(lambda _: b""),
    "text": rewrite(lambda _: b"this is a letter\n" * 20),
    "zero": rewrite(lambda _: header(0, 20)),
    "bomb": rewrite(lambda _: header(40_000, 40_000)),
    "dangling": put(lambda path: path.symlink_to("nowhere.png")),
    "circle": put(lambda path: path.symlink_to(path.name)),
    "unreadable": put(lambda path: path.symlink_to("/proc/self/mem")),  # which gives even root an error
}
ODD = {
    "folder": put(lambda path: path.mkdir()),
    "pixel": lambda path: Image.new("RGB", (1, 1), "red").save(path),
    "wide": lambda path: Image.new("RGB", (30_000, 20), "red").save(path),
}


def make_folder(root, count, spoiled):
    """`count` images, of which `spoiled` are bad or odd, one kind after the other. Returns the paths of the bad."""
    root.mkdir()
    bad, kinds = set(), {**BAD, **ODD}
    places = np.random.default_rng(0).permutation(count)[:spoiled]
    for n in range(count):
        image = np.random.default_rng(n).integers(0, 256, (24, 36, 3), np.uint8)
        Image.fromarray(image).save(root / f"{n:05}.png")
    for number, place in enumerate(places):
        kind, path = list(kinds)[number % len(kinds)], root / f"{place:05}.png"
        kinds[kind](path)
        bad |= {str(path)} if kind in BAD else set()
    return bad


def listed(runs):
    """The files that a run has passed over."""
    lines = (runs / STAGE / "skipped_files.txt").read_text().splitlines()
    names = [line.partition(": ")[0] for line in lines]
    assert len(set(names)) == len(names)
    return set(names)


def met(root, bad, world_size=1):
    """Those of the bad files that a training of an epoch meets. Of the held-out ones each rank has equally many."""
    met = set()
    for part in ("train", "val"):
        images = FolderImages(root, part, 32)
        count = len(images) if part == "train" else len(images) // world_size * world_size
        paths = [str(images.path(index)) for index in range(len(images))]
        while paths[count - 1] in bad and count < len(paths):
            count += 1  # the place of a bad one is taken by the next
        met |= {*paths[:count]} & bad
    return met


def assert_skipped(runs, root, bad, said, world_size=1):
    expected = met(root, bad, world_size)
    assert listed(runs) == expected
    assert f"{len(expected)} file(s) could not be decoded and were skipped: " in said
    last = metrics(runs / STAGE)
    counts = [row["data/skipped_files"] for row in last.values() if "data/skipped_files" in row]
    assert counts[-1] == len(expected)


def first_bad(root, bad):
    """What training meets first: at its place in the stream."""
    images = FolderImages(root, "train", 32)
    order = permutation(len(images), 0, 0).tolist()
    return next(path for index in order if (path := str(images.path(index))) in bad)


def test_every_kind_is_skipped_or_named(tmp_path, capsys):
    """The list is there with the first checkpoint; a run that is stopped after that has lost nothing of it."""
    root, runs = tmp_path / "images", tmp_path / "runs"
    bad = make_folder(root, 160, 22)
    given = [*TRAINING, *HALVES, f"data.root={root}", "validate_every=160", "checkpoint_every=40", "max_images=160"]
    with pytest.raises(ValueError, match=rf"^{re.escape(first_bad(root, bad))}: .*; data.on_error=skip passes over"):
        train(tmp_path / "refused", *given)
    train(runs, *given, "data.on_error=skip")
    assert_skipped(runs, root, bad, capsys.readouterr().out)


def test_what_is_skipped_is_listed_at_checkpoints(tmp_path):
    root, runs = tmp_path / "images", tmp_path / "runs"
    bad = make_folder(root, 60, 11)
    fault = [f"+callbacks.fault.{key}={value}" for key, value in FAULT.items()]
    given = [*TRAINING, f"data.root={root}", "validate_every=64", "checkpoint_every=48", "max_images=64"]
    with pytest.raises(RuntimeError, match="a fault of this rank"):
        train(runs, *given, "data.on_error=skip", *fault)
    assert listed(runs)
    assert listed(runs) <= bad


FAULT = {
    "_target_": "tests.reliability.faults.Fault",
    "stage": "autoencoder", "rank": 0, "what": "raise", "where": "validation",
}  # fmt: skip


@pytest.mark.parametrize("size", [(65_000, 1), (1, 65_000)])
def test_what_is_too_narrow_to_be_enlarged_is_refused_before_it_is(tmp_path, size):
    for n in range(2):
        Image.new("RGB", size).save(tmp_path / f"{n}.png")
    with pytest.raises(ImageError, match=rf"{size[0]}x{size[1]} pixels are too narrow to be enlarged to 256x256"):
        FolderImages(tmp_path, "train", 256)[0]


def spoil(root):
    arguments = {"_target_": "tests.reliability.faults.Spoil", "folder": root, "images": 80}
    return [f"+callbacks.spoil.{key}={value}" for key, value in arguments.items()]


def assert_survived(runs):
    """Of ten files one is gone, one cut short, one exchanged for another image and one a folder."""
    assert {name.removesuffix(".png")[-1] for name in listed(runs)} == set("013")  # see `faults.SPOILING`


def test_files_may_vanish_during_training(tmp_path):
    root, runs = tmp_path / "images", tmp_path / "runs"
    make_folder(root, 160, 0)
    given = [*TRAINING, *HALVES, f"data.root={root}", "validate_every=320", "checkpoint_every=320", "max_images=320"]
    train(runs, *given, "data.on_error=skip", *spoil(root))
    assert_survived(runs)


# At scale.

LARGE = (*TRAINING, *HALVES, "validate_every=1000", "checkpoint_every=500", "max_images=2000", "data.on_error=skip")


@pytest.fixture
def patient(monkeypatch):
    """An epoch takes minutes on a busy machine."""
    monkeypatch.setattr(kills, "TIME_LIMIT", 900)


@pytest.fixture(scope="module")
def large_folder(tmp_path_factory):
    """2,000 images, 5 % of them bad or odd."""
    root = tmp_path_factory.mktemp("large") / "images"
    return root, make_folder(root, 2000, 100)


@pytest.mark.soak
@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (1, 2), (2, 0), (2, 2)])
def test_two_thousand_images_one_in_twenty_bad(large_folder, tmp_path, world_size, workers, patient):
    root, bad = large_folder
    runs = tmp_path / "runs"
    given = (*LARGE, f"data.root={root}", f"data.num_workers={workers}", *(TWO if world_size > 1 else ()))
    ended = kills.start(runs, given, world_size=world_size)
    assert_skipped(runs, root, bad, ended.output, world_size)
    print(f"2,000 images, {len(bad)} bad, {len(listed(runs))} met and listed")


@pytest.mark.soak
@pytest.mark.parametrize(("world_size", "workers"), [(1, 2), (2, 2)])
def test_two_thousand_images_of_which_many_vanish(tmp_path, world_size, workers, patient):
    root, runs = tmp_path / "images", tmp_path / "runs"
    make_folder(root, 2000, 0)
    given = (*LARGE, f"data.root={root}", f"data.num_workers={workers}", *(TWO if world_size > 1 else ()))
    kills.start(runs, [*given, *spoil(root)], world_size=world_size)
    assert_survived(runs)
    print(f"800 of 2,000 spoiled during training, {len(listed(runs))} listed")


@pytest.mark.soak
@pytest.mark.parametrize("workers", [0, 2])
def test_the_first_of_two_thousand_is_named(large_folder, tmp_path, workers):
    root, bad = large_folder
    given = (*LARGE[:-1], f"data.root={root}", f"data.num_workers={workers}")
    with pytest.raises(ValueError, match=rf"^{re.escape(first_bad(root, bad))}: .*; data.on_error=skip passes over"):
        train(tmp_path / "runs", *given)

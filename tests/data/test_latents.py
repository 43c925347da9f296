"""The cache of latents: what it gives back, who fills it, and what is not taken for one."""

import itertools
import json
import math
import multiprocessing
import os
import pickle
import time

import pytest
import torch
from safetensors.torch import save_file

from ldm_lab.data import latents
from ldm_lab.data.drawn import DrawnImages
from ldm_lab.data.latents import CachedLatents, LatentCache
from ldm_lab.data.transforms import is_flipped
from ldm_lab.utils.reading import LoadError
from tests.security.guard import refusal
from tests.security.test_hostile_files import SAFETENSORS

SHAPE = (2, 3, 4, 4)
WHAT = {"autoencoder": {"weights": "ab"}, "images": {"fingerprint": "cd"}, "transform": {"image_size": [16, 16]}}


def cache(folder, count=40, shape=SHAPE, dtype="float32", what=WHAT):
    return LatentCache(folder, what, count, shape, dtype)


def moments(made, shard):
    generator = torch.Generator().manual_seed(shard)
    return torch.randn(len(made.indices(shard)), *made.shape, generator=generator)


def fill(made):
    """The shards that this process has written."""
    made.open_folder()
    mine = []
    for shard in made.missing():
        with made.claim(shard) as claimed:
            if claimed:
                made.write(shard, moments(made, shard), {})
                mine.append(shard)
    return mine


@pytest.fixture
def filled(tmp_path):
    made = cache(tmp_path)
    fill(made)
    return made


def test_items_are_what_was_written_mirrored_where_images_are(filled):
    assert [len(filled.indices(shard)) for shard in filled.shards] == [16, 16, 8]
    written = torch.cat([moments(filled, shard) for shard in filled.shards])
    seen = CachedLatents(filled, DrawnImages("train", 16, num_train=40, flip=True, seed=7))
    assert len(seen) == 40
    views = set()
    for position in range(60, 90):
        item = seen[position % 40, position]
        view = int(is_flipped(7, position))
        views.add(view)
        assert torch.equal(item["moments"], written[position % 40, view])
        assert (item["index"], item["position"]) == (position % 40, position)
        assert torch.equal(seen[position % 40]["moments"], written[position % 40, 0])
    assert views == {0, 1}
    assert set(item) == {"moments", "index", "position"}
    assert torch.equal(pickle.loads(pickle.dumps(seen))[39]["moments"], written[39, 0])
    with pytest.raises(LoadError, match="cannot be used"):
        seen[48]


@pytest.mark.parametrize(
    "change",
    [
        {"count": 41},
        {"shape": (1, 3, 4, 4)},
        {"dtype": "float16"},
        {"what": {**WHAT, "autoencoder": {"weights": "ac"}}},
        {"what": {**WHAT, "images": {"fingerprint": "ce"}}},
        {"what": {**WHAT, "transform": {"image_size": [16, 32]}}},
        {"what": {**WHAT, "precision": "bf16-mixed"}},
    ],
)
def test_whatever_decides_about_latents_is_in_the_key(tmp_path, change):
    assert cache(tmp_path, **change).key != cache(tmp_path).key == cache(tmp_path / "elsewhere").key


def test_rounding_is_measured_and_what_does_not_fit_is_refused(tmp_path):
    for dtype, expected in (("float16", 2.1e-4), ("bfloat16", 1.7e-3), ("float32", 0)):
        made = cache(tmp_path, dtype=dtype)
        fill(made)
        assert made.open(0).rounding == pytest.approx(expected, rel=0.1)
        assert made.open(0).moments[0, 0].dtype == latents.DTYPES[dtype]
    made = cache(tmp_path, dtype="float16")
    for value, message in ((7e4, "data.latents_dtype=float16: latents of up to 7e.04 do not fit"), (float("nan"), "")):
        with pytest.raises(ValueError, match=message or "not finite"):
            made.write(0, torch.full((16, *SHAPE), value), {})


def test_an_error_that_was_measured_is_kept(tmp_path):
    made = cache(tmp_path)
    made.open_folder()
    made.write(0, moments(made, 0), {}, latents.Error(7.71e-3, 0.11))
    made.write(1, moments(made, 1), {}, latents.Error(7.71e-3))
    made.write(2, moments(made, 2), {})
    assert made.open(0).error == (7.71e-3, 0.11)
    assert [math.isnan(value) for number in (1, 2) for value in made.open(number).error] == [False, True, True, True]


def test_skipped_files_are_reported_by_the_item_and_refused_where_none_may_be_skipped(tmp_path):
    made = cache(tmp_path)
    fill(made)
    made.write(1, moments(made, 1), {17: "a.png: cannot be read\nb.png: cannot be read"})
    images = DrawnImages("train", 16, num_train=40)
    images.on_error = "skip"
    seen = CachedLatents(made, images)
    item = seen[17, 57]
    assert (item["index"], item["position"]) == (19, 57)
    assert item["skipped"].splitlines() == ["a.png: cannot be read", "b.png: cannot be read"]
    assert seen[3]["skipped"] == ""
    with pytest.raises(ValueError, match=r"^a\.png: cannot be read; data\.on_error=skip passes over such files$"):
        CachedLatents(made, DrawnImages("train", 16, num_train=40)).shard(1)


def _fill(folder, delay, queue):
    made, write = cache(folder, count=160), LatentCache.write
    LatentCache.write = lambda *arguments: (time.sleep(delay), write(*arguments))
    queue.put(fill(made))


def test_two_processes_share_the_shards(tmp_path):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    both = [context.Process(target=_fill, args=(tmp_path, 0.02, queue)) for _ in range(2)]
    for process in both:
        process.start()
    shares = [queue.get(timeout=60) for _ in both]
    for process in both:
        process.join()
    made = cache(tmp_path, count=160)
    assert sorted(itertools.chain(*shares)) == list(made.shards)  # each once
    assert all(shares)
    assert made.missing() == []
    assert {path.name for path in made.folder.iterdir()} == {"meta.json", *(made.path(n).name for n in made.shards)}


def test_a_claim_ends_with_its_process(tmp_path):
    made = cache(tmp_path)
    made.open_folder()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        with made.claim(0):
            os.write(writer, b".")
            time.sleep(60)
    os.read(reader, 1)
    with made.claim(0) as mine, made.claim(1) as other:
        assert (mine, other) == (False, True)
    (made.folder / ".00000.safetensors.1.tmp").write_bytes(b"half")
    os.kill(child, 9)
    os.waitpid(child, 0)
    with made.claim(0) as mine:
        assert mine
        assert not list(made.folder.glob(".*.tmp"))


ADVICE = r"python -m ldm_lab cache --prune [0-9a-f]{16} removes it, and the same command encodes again"


@pytest.mark.parametrize("content", SAFETENSORS.values(), ids=SAFETENSORS)
def test_a_hostile_shard_is_refused_by_name(filled, tmp_path, content):
    length, text = content if isinstance(content, tuple) else (len(content), content)
    prefix = b"" if length is None else length.to_bytes(8, "little")
    filled.path(1).write_bytes(prefix + text + bytes(4))
    line = refusal(lambda: filled.open(1), tmp_path)
    assert line.startswith(f"{filled.path(1)}: cannot be used: ")
    assert line.endswith("and the same command encodes again")


def test_other_damage_is_refused_too(filled):
    path = filled.path(1)
    whole = path.read_bytes()
    damages = [
        lambda: path.write_bytes(whole[:-1]),
        lambda: path.write_bytes(whole + b"x"),
        lambda: path.write_bytes(b""),
        lambda: save_file({"moments": torch.zeros(16, *SHAPE).half()}, path),
        lambda: save_file({"moments": torch.zeros(15, *SHAPE)}, path),
        lambda: save_file({"x": torch.zeros(16, *SHAPE)}, path),
        lambda: save_file({"moments": torch.zeros(16, *SHAPE)}, path, metadata={"skipped": "[1]"}),
        lambda: save_file({"moments": torch.zeros(16, *SHAPE)}, path, metadata={"rounding": "no number"}),
        lambda: save_file({"moments": torch.zeros(16, *SHAPE)}, path, metadata={"codes": "[0.1]"}),
        lambda: (path.unlink(), os.mkfifo(path)),
    ]
    for damage in damages:
        damage()
        with pytest.raises(LoadError, match=ADVICE) as error:
            filled.open(1)
        assert str(path) in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"format": 1}', "[" * 10**5, " " * 2**21])
def test_another_meta_is_refused(filled, tmp_path, text):
    (filled.folder / "meta.json").write_text(text)
    line = refusal(filled.open_folder, tmp_path)
    assert line.startswith(str(filled.folder / "meta.json"))
    assert filled.key in line


def test_meta_says_what_it_is_and_is_touched(filled):
    path = filled.folder / "meta.json"
    assert json.loads(path.read_text()) | WHAT == json.loads(path.read_text())
    os.utime(path, (0, 0))
    filled.open_folder()
    assert path.stat().st_mtime > 1e9


def test_a_million_images_open_at_once(tmp_path):
    """Linked shards: nothing grows with the images but a name in a folder."""
    made = cache(tmp_path, count=1_000_000, shape=(1, 3, 64, 64), dtype="float16")
    assert made.num_bytes(made.count) == 1_000_000 * 3 * 64 * 64 * 2
    assert len(made.shards) == 1954
    made.open_folder()
    zeros = torch.zeros(made.shard_size, *made.shape)
    made.write(0, zeros, {})
    made.write(1953, zeros[: len(made.indices(1953))], {})
    for shard in made.shards[1:-1]:
        os.link(made.path(0), made.path(shard))
    before = time.perf_counter()
    seen = CachedLatents(made, DrawnImages("train", 16, num_train=10))
    assert made.missing() == []
    resident = _resident()
    for number in made.shards:
        seen.shard(number)
    assert seen[999_999]["moments"].shape == (3, 64, 64)
    assert time.perf_counter() - before < 10
    assert _resident() - resident < 50 * 2**20


def _resident():
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

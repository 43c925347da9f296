"""Latents in a store: machines without a common disk share them, and a fault costs one line."""

import multiprocessing
import os
import signal
import time

import pytest
from safetensors.torch import load_file

from ldm_lab.data.latents import LatentCache
from ldm_lab.data.shared_latents import SharedLatentCache
from ldm_lab.utils import stores
from ldm_lab.utils.reading import LoadError
from ldm_lab.utils.stores import StoreError
from ldm_lab.utils.urls import URL
from tests.data.test_latents import SHAPE, WHAT, fill, moments


def machine(folder, place, count=40):
    """The cache as a machine with this folder sees it; `place` is its address."""
    return SharedLatentCache(URL(f"s3://photos/{place}"), folder, WHAT, count, SHAPE, "float32")


def content(made):
    """The latents; safetensors writes notes in any order."""
    return [load_file(made.path(shard))["moments"].tolist() for shard in made.shards]


def test_a_second_machine_fetches_what_the_first_has_encoded(tmp_path, s3):
    one, two = (machine(tmp_path / name, "fetched") for name in "ab")
    assert fill(one) == list(one.shards)
    one.share()  # the description
    assert s3.names("fetched") == sorted(f"fetched/latents/{one.key}/{path.name}" for path in one.folder.iterdir())
    assert fill(two) == []
    assert two.missing() == []
    assert content(one) == content(two)
    assert {path.name for path in two.folder.iterdir()} == {path.name for path in one.folder.iterdir()}


def test_latents_from_before_the_store_are_given_to_it(tmp_path, s3):
    fill(LatentCache(tmp_path / "a", WHAT, 40, SHAPE, "float32"))
    machine(tmp_path / "a", "given").share()
    assert fill(machine(tmp_path / "b", "given")) == []
    asked = s3.count("PUT")
    machine(tmp_path / "a", "given").share()
    assert s3.count("PUT") == asked  # nothing twice


def _fill(folder, delay, queue):
    made, write = machine(folder, "both", count=480), LatentCache.write
    LatentCache.write = lambda *arguments: (time.sleep(delay), write(*arguments))
    made.open_folder()
    mine = []
    for shard in made.order(made.missing(), 0.0):
        with made.claim(shard) as claimed:
            if claimed:
                made.write(shard, moments(made, shard), {})
                mine.append(shard)
    queue.put((mine, made.missing()))


def test_two_machines_that_encode_at_the_same_time_share_the_work(tmp_path, s3):
    """A shard is done twice only if both come to it at the same moment."""
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    both = [context.Process(target=_fill, args=(tmp_path / name, 0.1, queue)) for name in "ab"]
    for process in both:
        process.start()
    shares, missing = zip(*(queue.get(timeout=60) for _ in both), strict=True)
    for process in both:
        process.join()
    count = len(machine(tmp_path / "a", "both", 480).shards)
    assert set(shares[0]) | set(shares[1]) == set(range(count))
    assert count == 30
    assert len(shares[0]) + len(shares[1]) <= 40
    assert all(shares)
    assert missing == ([], [])
    assert content(machine(tmp_path / "a", "both", 480)) == content(machine(tmp_path / "b", "both", 480))


def test_a_damaged_object_ends_in_one_line_and_nothing_is_kept(tmp_path, s3):
    one, two = (machine(tmp_path / name, "damaged") for name in "ab")
    fill(one)
    name = f"damaged/latents/{one.key}/00001.safetensors"
    whole = one.path(1).read_bytes()
    for damage in (whole[:-8], whole[:-1] + bytes([whole[-1] ^ 1])):
        s3.put(name, damage)
        with pytest.raises(LoadError, match=rf"paths\.cache=s3://photos/{name}: damaged; remove this object"):
            fill(two)
        assert two.missing() == [1, 2]
        assert not list(two.folder.glob(".*"))
    s3.remove(name)
    assert fill(two) == [1]


def test_a_busy_store_is_asked_again_and_a_refusal_is_not(tmp_path, s3, monkeypatch):
    one, two = (machine(tmp_path / name, "busy") for name in "ab")
    with s3.fault("busy", times=2, method="PUT"), s3.fault("cut", times=1, where="busy", method="GET"):
        fill(one)
        assert fill(two) == []
    asked = len(s3.asked)
    with s3.fault("denied"), pytest.raises(StoreError, match=r"paths\.cache=s3://.*refuses these credentials"):
        fill(machine(tmp_path / "c", "busy"))
    assert len(s3.asked) <= asked + 2
    monkeypatch.setattr(stores, "PATIENCE", 0.3)
    with s3.fault("busy"), pytest.raises(StoreError, match=r"status 503, for 0 s; the same command goes on"):
        fill(machine(tmp_path / "c", "busy"))
    with pytest.raises(StoreError, match=r"paths\.cache=s3://nowhere/.*no such bucket"):
        fill(SharedLatentCache(URL("s3://nowhere/x"), tmp_path / "d", WHAT, 40, SHAPE, "float32"))


def test_a_killed_upload_leaves_the_shard_here_and_nothing_there(tmp_path, s3):
    made = machine(tmp_path / "a", "killed")
    with s3.fault("slow", where="00001", method="PUT"):
        child = os.fork()
        if child == 0:
            fill(made)
            os._exit(0)
        while not s3.count("PUT", f"{made.key}/00001"):
            time.sleep(0.01)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert made.missing() == [2]
    time.sleep(2.5)  # the server ends its own request
    s3.remove(f"killed/latents/{made.key}/00001")
    assert fill(made) == [2]
    made.share()
    assert fill(machine(tmp_path / "b", "killed")) == []

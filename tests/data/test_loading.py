"""Loaders and shared memory: where there is too little of it nothing is lost, and nobody dies without a word."""

import logging
import os
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import Dataset

from ldm_lab.data import loading
from ldm_lab.data.loading import Collate, Loader, enough_shared_memory
from ldm_lab.utils import terminal
from ldm_lab.utils.errors import UserError

SIZE = 3 * 32 * 32 * 4  # bytes of an item


class Items(Dataset):
    """A view of a larger tensor, a number and a text each; `act` happens where the last one is read."""

    def __init__(self, act=lambda: None):
        self.images, self.act = torch.arange(8 * 3 * 32 * 32, dtype=torch.float32).reshape(8, 3, 32, 32), act

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        if index == len(self) - 1:
            self.act()
        return {"image": self.images[index], "index": index, "skipped": f"file {index}"}


def batches(workers, act=lambda: None):
    return list(Loader(Items(act), batch_size=4, num_workers=workers, collate_fn=Collate()))


def assert_equal_batches(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one["image"], other["image"])
        assert torch.equal(one["index"], other["index"])
        assert one["skipped"] == other["skipped"]


def test_too_little_shared_memory_is_not_used_and_said_once(monkeypatch, caplog):
    expected = batches(0)
    terminal.said_once.clear()
    monkeypatch.setattr(loading, "free", lambda: loading.ROOM * 2 * 4 * SIZE - 1)
    monkeypatch.setattr(torch.UntypedStorage, "_new_shared", lambda *_, **__: os._exit(1))  # in the workers
    with caplog.at_level(logging.WARNING):
        assert_equal_batches(batches(2), expected)
    (line,) = caplog.messages
    for part in ("/dev/shm", "data.num_workers=0", "--shm-size"):
        assert part in line


def test_enough_of_it_is_used(monkeypatch, caplog):
    monkeypatch.setattr(loading, "free", lambda: loading.ROOM * 2 * 4 * SIZE)
    found = batches(2)
    assert all(batch["image"].is_shared() for batch in found)
    assert_equal_batches(found, batches(0))
    assert caplog.messages == []


def test_a_view_is_sent_without_the_rest(monkeypatch):
    monkeypatch.setattr(loading, "get_worker_info", lambda: SimpleNamespace(num_workers=1))
    monkeypatch.setattr(loading, "free", lambda: 0)
    assert len(Collate()([Items()[0]]).items) < 2 * SIZE


def test_what_is_free_is_what_the_system_says(monkeypatch, tmp_path):
    monkeypatch.setattr(loading, "SHARED", str(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: {str(tmp_path): SimpleNamespace(free=7)}[path])
    assert loading.free() == 7
    monkeypatch.setattr(loading, "SHARED", str(tmp_path / "none"))
    assert loading.free() > 2**60


def no_room():
    raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1_2_3>: Resource unavailable")


@pytest.mark.parametrize("act", [no_room, lambda: os.kill(os.getpid(), signal.SIGBUS)], ids=["refused", "killed"])
def test_a_worker_that_dies_of_it_ends_in_one_line(act):
    with pytest.raises(UserError) as end, enough_shared_memory():
        batches(1, act)
    for part in ("/dev/shm", "data.num_workers=0", "--shm-size"):
        assert part in str(end.value)
    assert "\n" not in str(end.value)


def test_other_failures_of_workers_pass():
    def fail():
        raise RuntimeError("another")

    with pytest.raises(RuntimeError, match="another") as end, enough_shared_memory():
        batches(1, fail)
    assert not isinstance(end.value, UserError)

"""One command at a time in a folder: the second is told who is there, and a killed one leaves it free."""

import contextlib
import errno
import fcntl
import json
import os
import signal
import sys
import time
from multiprocessing import get_context

import pytest

from ldm_lab.sampling.files import RGB_PNG
from ldm_lab.utils import locks
from tests.trained import train


def hold(folder, loader, ready):
    """What a command does, here in a process that was forked, in a group of its own."""
    os.setpgrp()
    with locks.alone(folder, "another"):
        if loader and os.fork() == 0:  # as a loader that outlives its training
            time.sleep(60)
        ready.set()
        time.sleep(60)


@contextlib.contextmanager
def holder(folder, loader=False):
    """A process that holds the lock of a folder until it is killed."""
    fork = get_context("fork")
    ready = fork.Event()
    process = fork.Process(target=hold, args=(folder, loader, ready), daemon=True)
    process.start()
    assert ready.wait(30)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.join()


def test_who_comes_second_is_told_who_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "name=a b"])
    since = time.strftime("%Y-%m-%d %H:")
    with holder(tmp_path / "run") as other, pytest.raises(ValueError) as refusal, locks.alone(tmp_path / "run", "b"):
        pytest.fail("both are in")
    message = str(refusal.value)
    assert message.startswith(f"{tmp_path}/run is in use by process {other.pid} on {os.uname().nodename} since {since}")
    assert message.endswith(" (train.py 'name=a b'): wait for it, end it, or choose b")


@pytest.mark.parametrize("loader", [False, True])
def test_a_killed_process_leaves_the_folder_free(tmp_path, loader):
    """At once, also where one that it has forked lives on."""
    with holder(tmp_path, loader) as other:
        other.kill()
        other.join()
        assert (tmp_path / locks.NAME).is_file()
        with locks.alone(tmp_path, "another"):
            assert json.loads((tmp_path / locks.NAME).read_text())["process"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_nothing_stays_and_others_pass_by(tmp_path):
    with holder(tmp_path), locks.alone(tmp_path, "another", first=False):  # another rank
        assert (tmp_path / locks.NAME).is_file()
    (tmp_path / locks.NAME).unlink()
    with pytest.raises(KeyError), locks.alone(tmp_path, "another"):
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_ends_meanwhile_is_taken(tmp_path, monkeypatch):
    """Between the opening of the file and its locking the other one has removed it."""
    lockf, opened = fcntl.lockf, []

    def late(descriptor, how):
        if not opened:
            (tmp_path / locks.NAME).unlink()
        opened.append(descriptor)
        return lockf(descriptor, how)

    monkeypatch.setattr(locks.fcntl, "lockf", late)
    with locks.alone(tmp_path, "another"):
        assert (tmp_path / locks.NAME).read_text()
    assert len(opened) == 2


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_disk_without_locks_is_named_and_used(tmp_path, monkeypatch, caplog, number):
    def refuse(descriptor, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(locks.fcntl, "lockf", refuse)
    with locks.alone(tmp_path, "another"):
        pass
    assert caplog.messages == [
        f"{tmp_path} cannot be locked ({os.strerror(number)}): see that no second command writes there"
    ]


def test_where_nothing_can_be_written_nothing_is_locked(tmp_path):
    (tmp_path / "file").touch()
    with locks.alone(tmp_path / "file" / "run", "another"):
        pass


def test_what_somebody_has_put_in_the_place_of_a_lock_is_left_alone(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / locks.NAME).symlink_to(tmp_path / "precious")
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / locks.NAME)
    for name in ("link", "pipe"):
        with locks.alone(tmp_path / name, "another"):
            pass
    assert (tmp_path / "precious").read_text() == "mine"


FORGED = '{"host": "\\u001b[2J\\n", "process": 1, "since": 2, "command": "x"}'


@pytest.mark.parametrize(
    ("content", "who"),
    [("", "another process"), ("{", "another process"), ('{"host": "a"}', "another process"),
     (FORGED, r"process 1 on  \[2J  since 2 \(x\)")],
)  # fmt: skip
def test_a_lock_that_says_nothing_is_one(tmp_path, content, who):
    with holder(tmp_path):
        (tmp_path / locks.NAME).write_text(content)
        with pytest.raises(ValueError, match=f"is in use by {who}: wait"), locks.alone(tmp_path, "another"):
            pass


def test_a_second_training_of_a_run_touches_nothing(tmp_path):
    with (
        holder(tmp_path / "celebahq"),
        pytest.raises(ValueError, match=r"celebahq is in use .* or choose another name="),
    ):
        train(tmp_path, "experiment=celebahq")
    assert sorted(path.name for path in (tmp_path / "celebahq").iterdir()) == [locks.NAME]


def test_a_second_sampling_into_a_folder_touches_nothing(tiny_runs, tmp_path):
    from sample import job

    words = [f"ckpt={tiny_runs}/celebahq", f"output={tmp_path}/a", "num_samples=1", "sampler.steps=1", "trainer=cpu"]
    with holder(tmp_path / "a"), pytest.raises(ValueError, match=r"a is in use .* or choose another output="):
        job(words)
    assert [path.name for path in (tmp_path / "a").iterdir()] == [locks.NAME]
    job(words)  # what a killed command has left is no other's work
    assert RGB_PNG.path(tmp_path / "a", 0).is_file()
    assert not (tmp_path / "a" / locks.NAME).exists()

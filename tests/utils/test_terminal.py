"""Output fails nobody: names that cannot be printed, terminals and readers that are gone, a full disk."""

import contextlib
import io
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ldm_lab.utils.errors import reporting
from ldm_lab.utils.terminal import cry, lenient, said_once, say_once

ROOT = Path(__file__).resolve().parents[2]
UNPRINTABLE = "/data/\udcff/фото"


@pytest.fixture
def output(monkeypatch):
    """Gives a descriptor the place of standard output, as Python would."""
    opened = []

    def take(descriptor, encoding="utf-8"):
        opened.append(io.TextIOWrapper(io.BufferedWriter(io.FileIO(descriptor, "w")), encoding, line_buffering=True))
        monkeypatch.setattr(sys, "stdout", opened[-1])

    yield take
    for stream in opened:
        with contextlib.suppress(OSError):
            stream.close()


def test_a_line_is_logged_once_by_many_threads(monkeypatch):
    logged, start = [], threading.Barrier(8)

    def warning(line):
        time.sleep(0.05)  # the other threads come before the first has finished
        logged.append(line)

    def say():
        start.wait()
        say_once("the disk is full")

    monkeypatch.setattr(logging.getLogger("ldm_lab.utils.terminal"), "warning", warning)
    said_once.clear()
    threads = [threading.Thread(target=say) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert logged == ["the disk is full"]


def broken_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@pytest.mark.parametrize(("encoding", "escaped"), [("utf-8", "/data/\\udcff/фото"), ("ascii", None), ("latin-1", None)])
def test_what_has_no_code_is_escaped(output, tmp_path, encoding, escaped):
    before = os.open(tmp_path / "out", os.O_CREAT | os.O_WRONLY)
    output(before, encoding)
    mine = sys.stdout
    with lenient():
        print(UNPRINTABLE)
    assert sys.stdout is mine
    ascii_only = "/data/\\udcff/\\u0444\\u043e\\u0442\\u043e"
    assert (tmp_path / "out").read_text("utf-8") == (escaped or ascii_only) + "\n"


def test_a_reader_that_is_gone_ends_a_command_with_the_status_of_sigpipe(output, capfd):
    output(broken_pipe())
    with pytest.raises(SystemExit) as end, lenient(), reporting("testing"):
        print("a line")
    assert end.value.code == 141
    assert capfd.readouterr().err == ""


def test_a_reader_that_is_gone_asks_training_to_stop_once(output):
    output(broken_pipe())
    asked, before = [], signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    try:
        with lenient():
            for _ in range(3):
                print("a line")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert asked == [signal.SIGPIPE]


def test_what_is_left_to_write_at_the_end_stops_nothing(output):
    reader, writer = os.pipe()
    output(writer)
    with lenient():
        print("held in the buffer", end="")
        os.close(reader)


def test_a_terminal_that_is_gone_stops_nothing(output):
    ours, theirs = os.openpty()
    output(theirs)
    os.close(ours)
    with lenient():
        print("a line")
        print("another")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_loses_what_is_said_and_nothing_else(output):
    output(os.open("/dev/full", os.O_WRONLY))
    with lenient():
        print("a line")


def test_a_cry_needs_nobody_to_hear_it(monkeypatch):
    for stream in (None, io.StringIO()):
        monkeypatch.setattr(sys, "__stderr__", stream)
        cry("SIGHUP: stopping after this step")


def test_other_streams_stay(monkeypatch):
    for stream in (None, io.StringIO()):
        monkeypatch.setattr(sys, "stdout", stream)
        with lenient():
            assert sys.stdout is stream


def test_head_ends_a_tool_quietly():
    """Python itself says of what it could not flush: Exception ignored in ..."""
    reader, writer = os.pipe()
    process = subprocess.Popen([sys.executable, "-m", "ldm_lab"], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE)
    os.close(reader)
    os.close(writer)
    assert process.communicate(timeout=120)[1] == b""
    assert process.returncode in (0, 141)

"""Checkpoints survive: whole or not there, verified, with one before, written while training goes on."""

import contextlib
import errno
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning import Callback

from ldm_lab.checkpoints import checkpoint, locate
from ldm_lab.training import checkpoint_io
from ldm_lab.training.callbacks.checkpoint import Checkpoint
from ldm_lab.training.callbacks.ranks import SameStart
from ldm_lab.training.callbacks.validate import NEVER, Validate
from ldm_lab.training.checkpoint_io import BackgroundCheckpointIO
from ldm_lab.training.host_copy import HostCopy
from ldm_lab.training.planning import memory
from ldm_lab.utils.reading import LoadError
from ldm_lab.utils.writing import SaveError, replacing
from tests.trained import assert_equal, copy, last_checkpoint, metrics, train

ROOT = Path(__file__).resolve().parents[2]
STAGE_2 = "experiment=celebahq/diffusion"


def state(images, size=50_000):
    """A checkpoint without networks."""
    entry = {"stage": "diffusion", "images_seen": images, "configs": {}, "prefixes": {}}
    values = torch.arange(size, dtype=torch.float32) + images
    return {"state_dict": {"weight": values, "step": torch.tensor(images)}, checkpoint.ENTRY: entry}


def save(path, images=8, **more):
    checkpoint.save(state(images, **more), path)
    return path


def images_in(path):
    return checkpoint.load(path)[checkpoint.ENTRY]["images_seen"]


@pytest.fixture
def folder(tmp_path):
    """`checkpoints/` with a state at 16 images and the one before, at 8."""
    save(tmp_path / "previous.ckpt", 8)
    save(tmp_path / "last.ckpt", 16)
    return tmp_path


@pytest.fixture
def said():
    return []


def flip(path, positions):
    content = bytearray(path.read_bytes())
    for position in positions:
        content[position // 8] ^= 1 << position % 8
    path.write_bytes(content)


# --- what was written is what is read


@pytest.mark.parametrize("length", [0, 1, 3, 100, 4096, 100_000, -100_000, -500, -22, -1])
def test_a_truncated_checkpoint_is_damaged_and_the_one_before_is_taken(folder, said, length):
    last = folder / "last.ckpt"
    last.write_bytes(last.read_bytes()[:length])
    with pytest.raises(LoadError, match=r"last\.ckpt: damaged \(") as error:
        checkpoint.load(last)
    assert "\n" not in str(error.value)
    assert checkpoint.newest(folder, said.append) == folder / "previous.ckpt"
    assert said == [f"{error.value}: previous.ckpt takes its place"]


def test_every_flipped_bit_in_what_is_read_is_found(tmp_path):
    """400 times one bit, at random: the file is refused, or (where nothing is read there) holds what was written."""
    draw, path = random.Random(0), tmp_path / "last.ckpt"
    save(path, 8, size=1000)
    written, expected, refused = path.read_bytes(), checkpoint.load(path), 0
    for _ in range(400):
        position = draw.randrange(8 * len(written))
        flip(path, [position])
        try:
            assert_equal(checkpoint.load(path), expected, f"bit {position}")
        except LoadError:
            refused += 1
        path.write_bytes(written)
    assert refused > 200


def test_a_flipped_bit_in_a_tensor_is_what_torch_does_not_see(tmp_path):
    path = save(tmp_path / "last.ckpt")
    place_of_tensor = path.read_bytes().index(state(8)["state_dict"]["weight"].numpy().tobytes())
    flip(path, [8 * (place_of_tensor + 80_000)])
    assert not torch.equal(torch.load(path)["state_dict"]["weight"], state(8)["state_dict"]["weight"])
    with pytest.raises(LoadError, match=r"last\.ckpt: damaged \(CRC mismatch in .*data/0: the file is corrupt\)"):
        checkpoint.load(path)
    assert checkpoint.describe(path)["images_seen"] == 8  # reads no tensor


def test_a_file_that_would_be_larger_than_it_is(tmp_path):
    """A bomb is not unpacked to find that it is one."""
    with checkpoint.zipfile.ZipFile(tmp_path / "last.ckpt", "w", checkpoint.zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data/0", bytes(10**7))
    with pytest.raises(LoadError, match="its parts are larger than the whole"):
        checkpoint.load(tmp_path / "last.ckpt")


def test_checkpoints_of_before_have_their_checksums_already(tmp_path):
    torch.save(state(8), tmp_path / "last.ckpt")
    assert_equal(checkpoint.load(tmp_path / "last.ckpt"), state(8))


@pytest.mark.parametrize("damage", ["empty", "truncated", "flipped", "missing"])
def test_where_none_is_whole_nothing_is_touched(folder, said, damage):
    paths = [folder / "last.ckpt", folder / "previous.ckpt"]
    for path in paths:
        if damage == "flipped":
            flip(path, [8 * 100_000])
        else:
            path.write_bytes(b"" if damage == "empty" else path.read_bytes()[:5000])
    if damage == "missing":
        paths.pop().unlink()
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(
        LoadError, match=r"no whole checkpoint is left; put one there, or choose another name=$"
    ) as error:
        checkpoint.newest(folder, said.append)
    assert all(str(path) in str(error.value) for path in paths)
    assert "\n" not in str(error.value)
    assert said == []
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_the_newest_of_nothing_and_of_one(folder, said, tmp_path):
    assert checkpoint.newest(folder, said.append) == folder / "last.ckpt"
    (folder / "last.ckpt").unlink()
    assert checkpoint.newest(folder, said.append) == folder / "previous.ckpt"
    assert checkpoint.newest(tmp_path / "new", said.append) is None
    assert said == []


# --- writing in the background


def begin(io_, images, path):
    io_.save_checkpoint(state(images), path)


def test_the_file_before_stays_and_a_damaged_one_never_takes_its_place(folder, said):
    last, previous = folder / "last.ckpt", folder / "previous.ckpt"
    io_ = BackgroundCheckpointIO()
    io_.load_checkpoint(last)
    for images in (24, 32):
        begin(io_, images, last)
        io_.wait()
        assert (images_in(last), images_in(previous)) == (images, images - 8)
    last.write_bytes(b"")
    io_ = BackgroundCheckpointIO()
    io_.load_checkpoint(checkpoint.newest(folder, said.append))
    for images, before in ((32, 24), (40, 32)):
        begin(io_, images, last)
        io_.wait()
        assert (images_in(last), images_in(previous)) == (images, before)
    assert sorted(path.name for path in folder.iterdir()) == ["last.ckpt", "previous.ckpt"]


class SlowDisk:
    """Every write waits until it is let through."""

    def __init__(self, monkeypatch):
        self.open, self.reached = threading.Event(), threading.Event()
        real = checkpoint_io.Output.write

        def write(output, data):
            self.reached.set()
            assert self.open.wait(30)
            return real(output, data)

        monkeypatch.setattr(checkpoint_io.Output, "write", write)


@pytest.fixture
def slow_disk(monkeypatch):
    disk = SlowDisk(monkeypatch)
    yield disk
    disk.open.set()


def test_training_goes_on_and_the_file_holds_the_state_of_when_it_was_saved(tmp_path, slow_disk):
    io_, last = BackgroundCheckpointIO(), tmp_path / "last.ckpt"
    changing = state(8)
    inner = changing["state_dict"]["weight"]
    io_.save_checkpoint(changing, last)
    assert slow_disk.reached.wait(10)
    inner.zero_()  # the next step, while not a byte is written
    changing[checkpoint.ENTRY]["images_seen"] = 16
    io_.check()
    assert not last.exists()
    slow_disk.open.set()
    io_.wait()
    assert_equal(checkpoint.load(last), state(8))


def test_the_next_save_waits_for_the_one_before(tmp_path, slow_disk):
    io_, last = BackgroundCheckpointIO(), tmp_path / "last.ckpt"
    begin(io_, 8, last)
    second = threading.Thread(target=begin, args=(io_, 16, last))
    second.start()
    second.join(0.3)
    assert second.is_alive()
    slow_disk.open.set()
    second.join(10)
    io_.wait()
    assert images_in(last) == 16
    assert images_in(tmp_path / "previous.ckpt") == 8


def test_a_copy_is_taken_in_the_same_memory_and_keeps_what_is_beside_the_tensors():
    changing = {**state(8), "optimizer": {0: {"step": torch.tensor(1.0)}}, "list": [torch.ones(2, 3).T, "a", 1]}
    changing["state_dict"] = torch.nn.BatchNorm1d(3).state_dict()
    copies = HostCopy()
    first = copies.take(changing)
    assert_equal(first, changing)
    assert first["state_dict"]._metadata == changing["state_dict"]._metadata
    places = [first["list"][0].data_ptr(), first["optimizer"][0]["step"].data_ptr()]
    changing["list"][0].add_(1)
    assert not torch.equal(first["list"][0], changing["list"][0])
    second = copies.take(changing)
    assert_equal(second, changing)
    assert [second["list"][0].data_ptr(), second["optimizer"][0]["step"].data_ptr()] == places
    changing["optimizer"][1] = {"step": torch.zeros(3)}  # state that has come since
    assert_equal(copies.take(changing), changing)


def test_without_memory_for_a_copy_training_waits(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(memory, "budget", lambda device: 100_000)  # bytes; the state takes 200,000
    io_, changing = BackgroundCheckpointIO(), state(8)
    monkeypatch.setattr(io_._copy, "take", None)
    io_.save_checkpoint(changing, tmp_path / "last.ckpt")
    assert images_in(tmp_path / "last.ckpt") == 8  # at once
    assert "host memory has no room for a copy of the state" in caplog.text


# --- the disk refuses


def refuse(monkeypatch, number, after=1):
    """The disk takes `after` writes and refuses the next."""
    real, count = checkpoint_io.Output.write, []

    def write(output, data):
        count.append(1)
        if len(count) > after:
            raise OSError(number, os.strerror(number))
        return real(output, data)

    monkeypatch.setattr(checkpoint_io.Output, "write", write)


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "No space left on device. .*: free some space on this disk, and the same command goes on$"),
        (errno.EFBIG, r"File too large. .*: raise the limit on the size of files \(ulimit -f\), and"),
        (errno.EIO, "Input/output error. What was there before is untouched: put that right, and the same"),
    ],
)
@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_write_that_fails_is_heard_of_and_leaves_no_trace(folder, monkeypatch, number, advice, after):
    io_, last = BackgroundCheckpointIO(), folder / "last.ckpt"
    io_.load_checkpoint(last)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    refuse(monkeypatch, number, after)
    for hear in (io_.wait, lambda: begin(io_, 32, last), lambda: until(io_.check)):
        begin(io_, 24, last)
        with pytest.raises(SaveError, match=rf"last\.ckpt: cannot be written: {advice}") as error:
            hear()
        assert "\n" not in str(error.value)
        assert {path: path.read_bytes() for path in folder.iterdir()} == before
    io_.wait()  # nothing is left to be said


def until(act):
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        act()
        time.sleep(0.01)


def test_a_full_disk_while_the_one_before_is_kept(folder, monkeypatch):
    """Where the disk has no links, keeping it is a copy, for which there may be no room."""
    io_, last = BackgroundCheckpointIO(), folder / "last.ckpt"
    io_.load_checkpoint(last)
    before = {path: path.read_bytes() for path in folder.iterdir()}

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "link", fail)
    monkeypatch.setattr(shutil, "copyfile", fail)
    begin(io_, 24, last)
    with pytest.raises(SaveError, match="No space left"):
        io_.wait()
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("step", ["fsync", "replace", "chmod"])
def test_a_file_that_cannot_be_published_leaves_no_trace(tmp_path, monkeypatch, step):
    target = tmp_path / "file"
    target.write_text("old")

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(*((Path, step) if step == "chmod" else (os, step)), fail)
    with pytest.raises(SaveError, match="file: cannot be written"), replacing(target) as temporary:
        temporary.write_text("new")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_file_and_folder_are_flushed_around_the_renaming(tmp_path, monkeypatch):
    order, real = [], os.replace
    monkeypatch.setattr(os, "fsync", lambda file: order.append(os.readlink(f"/proc/self/fd/{file}")))
    monkeypatch.setattr(os, "replace", lambda *names: order.append("rename") or real(*names))
    save(tmp_path / "last.ckpt")
    assert order == [f"{tmp_path}/.last.ckpt.{os.getpid()}.tmp", "rename", str(tmp_path)]


# --- a training


class FakeTrainer(SimpleNamespace):
    """A step loop with a checkpoint each step."""

    def __init__(self, folder, io_):
        super().__init__(
            world_size=1, is_global_zero=True, loggers=[], global_step=0, max_steps=99, val_check_batch=0,
            datamodule=SimpleNamespace(global_batch_size=8), strategy=SimpleNamespace(checkpoint_io=io_),
            _logger_connector=SimpleNamespace(update_train_step_metrics=lambda: None),
        )  # fmt: skip
        self.module, self.callback = SimpleNamespace(images_seen=0), Checkpoint(folder, 8, Validate(NEVER))
        self.callback.on_train_start(self, self.module)

    def save_checkpoint(self, path):
        self.strategy.checkpoint_io.save_checkpoint(state(self.module.images_seen), path)

    def step(self, save=True):
        self.global_step += 1
        self.module.images_seen += 8
        self.callback.every.last = self.module.images_seen * (not save)
        self.callback.on_train_batch_end(self, self.module)


def test_steps_do_not_wait_for_the_disk_and_the_end_does(tmp_path, slow_disk):
    trainer = FakeTrainer(tmp_path, BackgroundCheckpointIO())
    trainer.step()
    assert slow_disk.reached.wait(10)
    for _ in range(20):
        trainer.step(save=False)
    assert not (tmp_path / "last.ckpt").exists()
    ending = threading.Thread(target=trainer.callback.on_train_end, args=(trainer, trainer.module))
    ending.start()
    ending.join(0.3)
    assert ending.is_alive()
    slow_disk.open.set()
    ending.join(10)
    assert images_in(tmp_path / "last.ckpt") == 8


def test_training_stops_at_the_step_after_a_failed_write(tmp_path, monkeypatch):
    trainer = FakeTrainer(tmp_path, BackgroundCheckpointIO())
    refuse(monkeypatch, errno.ENOSPC)
    trainer.step()
    with pytest.raises(SaveError, match="No space left"):
        until(lambda: trainer.step(save=False))
    assert list(tmp_path.iterdir()) == []


def test_an_error_waits_for_the_file_and_ctrl_c_does_not(tmp_path, slow_disk):
    trainer = FakeTrainer(tmp_path, BackgroundCheckpointIO())
    trainer.step()
    assert slow_disk.reached.wait(10)
    trainer.callback.on_exception(trainer, trainer.module, KeyboardInterrupt())
    slow_disk.open.set()
    with contextlib.suppress(SaveError):
        trainer.strategy.checkpoint_io.wait()
    assert list(tmp_path.iterdir()) == []

    trainer = FakeTrainer(tmp_path, BackgroundCheckpointIO())
    trainer.step()
    trainer.callback.on_exception(trainer, trainer.module, RuntimeError())
    assert images_in(tmp_path / "last.ckpt") == 8


@pytest.mark.parametrize(("others", "agree"), [(8, True), (0, False), (16, False)])
def test_processes_that_found_different_states_do_not_start(others, agree):
    def reduce(seen, reduce_op):
        return torch.maximum(seen, torch.tensor([others, -others]))

    strategy = SimpleNamespace(reduce=reduce, root_device="cpu")
    trainer, module = SimpleNamespace(world_size=2, strategy=strategy), SimpleNamespace(images_seen=8)
    with contextlib.nullcontext() if agree else pytest.raises(LoadError, match=r"some processes start at [08] images"):
        SameStart().on_train_start(trainer, module)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty"])
def test_a_run_goes_on_from_the_one_before(tiny_runs, tmp_path, capsys, caplog, damage):
    """... and ends where it would have ended; its metrics are those of what was trained."""
    runs = copy(tiny_runs, tmp_path)
    stage = runs / "celebahq/diffusion"
    last, final = stage / "checkpoints/last.ckpt", last_checkpoint(stage)
    rows = metrics(stage)
    shutil.rmtree(stage / "final")
    content = bytearray(last.read_bytes())
    last.unlink()  # the name: its file is the fixture's too
    content[len(content) // 2] ^= 1
    last.write_bytes({"truncated": content[: len(content) // 2], "flipped": content, "empty": b""}[damage])
    (stage / "status.json").unlink()
    (stage / "status.json").write_text('{"finished": false}')

    assert locate.find(runs / "celebahq").images_seen == 48
    assert re.search(r"last\.ckpt: damaged \(.*\): previous\.ckpt takes its place", caplog.text)
    train(runs, STAGE_2)
    said = capsys.readouterr().out
    assert said.count("last.ckpt: damaged (") == 1
    assert "continuing" in said
    assert "at 48 of 64 images" in said
    for part in ("state_dict", "optimizer_states", "ldm_lab"):
        assert_equal(last_checkpoint(stage)[part], final[part], part)
    again = metrics(stage)
    assert again.keys() == rows.keys()
    assert all(again[n]["train/loss"] == rows[n]["train/loss"] for n in rows)
    assert images_in(stage / "checkpoints/previous.ckpt") == 48  # never the damaged one


class Hurt(Callback):
    """Something befalls the process while it writes the checkpoint of `images` images."""

    def __init__(self, how, images):
        self.how, self.images = how, images

    def on_save_checkpoint(self, trainer, module, state):
        if module.stage == "diffusion" and module.images_seen == self.images:
            real = checkpoint_io.Output.write

            def write(output, data):
                if output.tell() > 50_000:
                    if self.how == "kill":
                        os.kill(os.getpid(), signal.SIGKILL)
                    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
                return real(output, data)

            checkpoint_io.Output.write = write


def command(runs, *overrides):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "train.py", STAGE_2, "debug=tiny", "logger=csv", f"paths.runs={runs}", *overrides],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def hurt(how, images):
    arguments = {"_target_": "tests.training.test_durability.Hurt", "how": how, "images": images}
    return ["plugins=[tests]", *[f"+callbacks.hurt.{key}={value}" for key, value in arguments.items()]]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["kill", pytest.param("limit", marks=pytest.mark.soak)])
def test_a_process_that_ends_while_it_writes_loses_no_more_than_an_interval(tiny_runs, tmp_path, how):
    """SIGKILL, and a limit on the size of files as `ulimit -f` sets it; then the same command goes on."""
    runs = copy(tiny_runs, tmp_path)
    reference = last_checkpoint(runs / "celebahq/diffusion")
    shutil.rmtree(runs / "celebahq/diffusion")
    stage, checkpoints = runs / "celebahq/diffusion", runs / "celebahq/diffusion/checkpoints"
    ended = command(runs, *hurt(how, 48))
    stale = list(checkpoints.glob(".*"))
    assert images_in(checkpoints / "last.ckpt") == 32
    assert images_in(checkpoints / "previous.ckpt") == 16
    if how == "kill":
        assert ended.returncode == -signal.SIGKILL
        assert len(stale) == 1
    else:
        assert ended.returncode == 1
        assert stale == []
        error = next(line for line in ended.stderr.splitlines() if line.startswith("error: "))
        assert error.startswith(f"error: {checkpoints}/last.ckpt: cannot be written: File too large. What was there")
        assert "Traceback" not in ended.stderr
    assert train(runs, STAGE_2) is not None
    assert list(stage.rglob(".*")) == []
    for part in ("state_dict", "optimizer_states", "ldm_lab"):
        assert_equal(last_checkpoint(stage)[part], reference[part], part)
    assert sorted(metrics(stage)) == [8, 16, 24, 32, 40, 48, 56, 64]


def on_a_small_disk(folder, kilobytes, source, command):
    """Run `command` with a disk of that size at `folder`, filled with `source`; what is on it then comes to `out`."""
    mount = f"mount -t tmpfs -o size={kilobytes}k none {folder} && cp -r {source}/. {folder}"
    script = f"{mount} && {{ {command}; code=$?; cp -r {folder}/. {folder}.out; exit $code; }}"
    return subprocess.run(["unshare", "-m", "sh", "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_disk_that_is_full(tiny_runs, tmp_path):
    """One with room for two checkpoints and a half."""
    disk, source = tmp_path / "disk", tmp_path / "source"
    disk.mkdir()
    (tmp_path / "disk.out").mkdir()
    shutil.copytree(tiny_runs / "celebahq/autoencoder/final", source / "celebahq/autoencoder/final")
    if on_a_small_disk(disk, 100_000, source, "true").returncode:
        pytest.skip("only root may mount a disk")
    there = sum(path.stat().st_size for path in source.rglob("*"))
    size = (tiny_runs / "celebahq/diffusion/checkpoints/last.ckpt").stat().st_size
    run = f"PYTHONPATH=. OMP_NUM_THREADS=1 {sys.executable} train.py {STAGE_2} debug=tiny logger=csv callbacks=none"
    ended = on_a_small_disk(disk, (there + size * 5 // 2) // 1024, source, f"{run} paths.runs={disk}")
    assert ended.returncode == 1, ended.stderr
    error = next(line for line in ended.stderr.splitlines() if line.startswith("error: "))
    assert re.search(r"cannot be written: No space left on device\. .*: free some space on this disk, and", error)
    assert "Traceback" not in ended.stderr
    stage = Path(f"{disk}.out/celebahq/diffusion")
    assert [images_in(stage / f"checkpoints/{name}.ckpt") for name in ("last", "previous")] == [32, 16]
    assert list(stage.rglob(".*")) == []

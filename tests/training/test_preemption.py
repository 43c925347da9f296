"""Signals at any moment and to anyone: the command ends soon, with a status that tells which, and continues."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ldm_lab.utils.errors import reporting
from ldm_lab.utils.signals import STOPPING, listen
from tests.trained import assert_equal, final_weights, last_checkpoint, metrics, small, train

ROOT = Path(__file__).resolve().parents[2]
RECIPE = "experiment=celebahq"
INT, TERM, USR1, HUP = STOPPING


def sending(number, stage, images, where="train", **more):
    """Overrides that send a signal (see `tests.callbacks.Signal`)."""
    arguments = {"stage": stage, "images": images, "where": where, "number": int(number), **more}
    settings = [f"+callbacks.interrupt.{key}={value}" for key, value in arguments.items()]
    return ["plugins=[tests]", "+callbacks.interrupt._target_=tests.callbacks.Signal", *settings]


def start(runs, *overrides):
    """`python train.py debug=tiny ...` in a group of processes of its own."""
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    return subprocess.Popen(
        [sys.executable, "train.py", "debug=tiny", "logger=csv", f"paths.runs={runs}", *small(overrides), *overrides],
        cwd=ROOT, env=environment | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def run(runs, *overrides):
    """The same to its end: status, output, errors."""
    process = start(runs, *overrides)
    try:
        out, err = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, out, err


def assert_same_run(folder, reference):
    """Weights, states and metrics, all but speed."""
    for stage in ("autoencoder", "diffusion"):
        assert_equal(final_weights(folder / stage), final_weights(reference / stage))
        states = [last_checkpoint(one / stage) for one in (folder, reference)]
        for part in ("state_dict", "optimizer_states", "ldm_lab"):
            assert_equal(states[0][part], states[1][part], part)
        rows = [metrics(one / stage) for one in (folder, reference)]
        for row in [row for some in rows for row in some.values()]:
            for name in [name for name in row if name.startswith("perf/")]:
                del row[name]
        assert rows[0] == rows[1]


# --- in one process, at any moment


def command(runs, *overrides):
    """What `train.py` does, in this process: the status that it ends with."""
    before = [signal.getsignal(number) for number in STOPPING]
    listen()
    try:
        with reporting("training"):
            train(runs, *overrides)
    except SystemExit as end:
        return end.code
    finally:
        for number, handler in zip(STOPPING, before, strict=True):
            signal.signal(number, handler)
    return 0


def test_outside_of_training_a_signal_ends_the_command_at_once(tiny_runs, tmp_path, capsys):
    """Before the first step, before the export, after it, and before the second stage trains."""
    for stage, images, where, number, said in (
        ("autoencoder", 0, "setup", TERM, "stopped\n"),
        ("autoencoder", 64, "fit_end", USR1, "stopped and saved at 64 images"),
        ("autoencoder", 64, "teardown", INT, "stopped\n"),
        ("diffusion", 0, "setup", USR1, "stopped\n"),
    ):
        assert command(tmp_path, RECIPE, *sending(number, stage, images, where)) == 128 + number
        heard = capsys.readouterr()
        assert said in heard.out + heard.err
    assert command(tmp_path, RECIPE) == 0
    assert_same_run(tmp_path / "celebahq", tiny_runs / "celebahq")


def test_a_second_signal_has_a_status_too(tmp_path):
    assert command(tmp_path, RECIPE, *sending(INT, "autoencoder", 8, times=2)) == 130


# --- many processes


@pytest.mark.soak
@pytest.mark.parametrize("number", [INT, TERM, USR1])
def test_a_signal_to_the_whole_group_finds_the_loaders_alive(tiny_runs, tmp_path, number):
    group = sending(number, "autoencoder", 16, group=True)
    status, out, err = run(tmp_path, RECIPE, "data.num_workers=2", *group)
    assert status == 128 + number, err
    assert "stopped and saved at 24 images; the same command continues" in out
    assert err.count("stopping after this step") == 1
    assert "Traceback" not in err
    if number == USR1:
        train(tmp_path, RECIPE)
        assert_same_run(tmp_path / "celebahq", tiny_runs / "celebahq")


def children(pid):
    """The processes that a process has started, and theirs."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if parent == pid:
            found += [int(stat.parent.name), *children(int(stat.parent.name))]
    return found


def wait_for(condition, seconds):
    deadline = time.monotonic() + seconds
    while not (value := condition()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return value


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
@pytest.mark.parametrize(
    ("number", "stage"), [pytest.param(signal.SIGKILL, "step", marks=pytest.mark.soak), (TERM, "start")]
)
def test_no_loader_outlives_its_training(tmp_path, number, stage):
    """The parent alone is killed, or is ended while it starts them: nobody tells its loaders."""
    process = start(tmp_path, RECIPE, "data.num_workers=2", "max_images=1000000")
    workers = wait_for(lambda: len(children(process.pid)) >= 2 and children(process.pid), 180)
    assert workers, "no loader after three minutes"
    if stage == "step":
        assert wait_for(lambda: list(tmp_path.rglob("last.ckpt")), 60)
    os.kill(process.pid, number)
    process.communicate(timeout=60)
    assert process.returncode in (-number, 128 + number)
    assert wait_for(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers), 15)


TWO = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2")


@pytest.mark.soak
def test_a_signal_to_one_rank_stops_all_at_one_place_and_they_continue(tmp_path):
    """The ranks compare notes at the validation, after 32 images, which both break off."""
    overrides = ("experiment=celebahq/autoencoder", *TWO)
    status, out, err = run(tmp_path, *overrides, *sending(TERM, "autoencoder", 16, rank=1))
    assert status == 143, err
    assert out.count("stopped and saved at 32 images") == 1
    folder = tmp_path / "celebahq/autoencoder"
    assert last_checkpoint(folder)["ldm_lab"]["images_seen"] == 32
    assert "val/loss" not in metrics(folder)[32]
    status, out, err = run(tmp_path, *overrides)
    assert status == 0, err
    assert "at 32 of 64 images" in out
    assert [images for images, row in metrics(folder).items() if "val/loss" in row] == [32, 64]


@pytest.mark.soak
def test_a_signal_to_all_ranks_and_their_loaders(tmp_path):
    group = sending(USR1, "autoencoder", 16, group=True, rank=1)
    status, out, err = run(tmp_path, RECIPE, *TWO, "data.num_workers=1", "validate_every=1000", *group)
    assert status == 138, err
    assert out.count("stopped and saved at 64 images") == 1
    assert err.count("stopping after this step") == 1
    assert "Traceback" not in err

"""The real W&B, offline: what goes wrong with it stops nothing, and a run that is resumed goes on in it."""

import json
import os
import resource
import signal
import struct
import sys
from pathlib import Path

import pytest
from lightning import Callback
from wandb.proto import wandb_internal_pb2

from tests.trained import metrics, train
from tests.training.test_ddp import command
from tests.training.test_loggers import log, logger, rows

STAGE_1 = "experiment=celebahq/autoencoder"
linux = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")


def services():
    """The processes of W&B that this one has started."""
    children = {n for path in Path("/proc/self/task").glob("*/children") for n in path.read_text().split()}
    return [int(n) for n in children if "wandb" in Path(f"/proc/{n}/cmdline").read_text()]


class KillService(Callback):
    """Kills the processes of W&B in the middle of the training."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if module.images_seen == 24:
            for number in services():
                os.kill(number, signal.SIGKILL)


@pytest.fixture
def nobody(tmp_path, monkeypatch):
    """Nobody is logged in here."""
    for variable in ("WANDB_API_KEY", "WANDB_MODE", "NETRC"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def records(path):
    """The records of a `.wandb` file, a log of LevelDB's format behind a header of 7 bytes."""
    data, place, record = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if (left := 32768 - place % 32768) < 7:  # no header fits into the rest of a block
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""


def history(folder):
    """The metrics of all starts, earliest first, by images seen."""
    found = {}
    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb"), key=lambda path: path.parent.name):
        for record in records(path):
            items = [(item.key or "/".join(item.nested_key), item.value_json) for item in record.history.item]
            row = {key: json.loads(value) for key, value in items if not key.startswith(("_", "pictures"))}
            if len(row) > 1:  # more than its axis: pictures are not looked at
                found.setdefault(int(row["images_seen"]), {}).update(row)
    return found


@linux
@pytest.mark.soak
def test_a_crash_of_the_service_stops_nothing(tmp_path, nobody):
    kill = ["plugins=[tests]", "+callbacks.kill._target_=tests.training.test_wandb.KillService"]
    done = command(STAGE_1, "logger=many", f"paths.runs={tmp_path}", *kill)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("W&B is away (") == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(metrics(tmp_path / "celebahq/autoencoder")) == list(range(8, 72, 8))


def test_a_folder_that_cannot_be_written_stops_nothing(tmp_path, nobody, caplog):
    (tmp_path / "celebahq/autoencoder").mkdir(parents=True)
    (tmp_path / "celebahq/autoencoder/wandb").write_text("in the way")
    train(tmp_path, STAGE_1, "logger=many")
    assert sum(record.getMessage().startswith("W&B is away (") for record in caplog.records) == 1
    assert sorted(metrics(tmp_path / "celebahq/autoencoder")) == list(range(8, 72, 8))


@linux
def test_a_disk_that_is_full_for_the_service_alone_is_noticed(tmp_path, nobody, caplog):
    one = logger(tmp_path, offline=True)
    log(one, 8, loss=1.0)
    for number in services():
        resource.prlimit(number, resource.RLIMIT_FSIZE, (40_000, 40_000))
    for images in range(16, 16_000, 8):
        log(one, images, loss=1 / images)
    one.finalize("success")
    (record,) = [record for record in caplog.records if record.name.startswith("ldm_lab")]
    assert record.getMessage().startswith("W&B is away (some records could not be written, see ")


def test_the_files_of_several_starts_together_hold_what_metrics_csv_holds(tmp_path, nobody):
    stage = tmp_path / "celebahq/autoencoder"
    interrupt = {"_target_": "tests.callbacks.Signal", "stage": "autoencoder", "images": 32}
    settings = [f"+callbacks.interrupt.{key}={value}" for key, value in interrupt.items()]
    with pytest.raises(SystemExit):
        train(tmp_path, STAGE_1, "logger=many", "plugins=[tests]", *settings)
    train(tmp_path, STAGE_1, "logger=many")
    names = [path.name for path in stage.glob("wandb/offline-run-*/run-*.wandb")]
    assert names == [f"run-{(stage / 'wandb_id').read_text()}.wandb"] * 2
    logged = {n: {key: f"{value:.6g}" for key, value in row.items()} for n, row in history(stage).items()}
    kept = {int(row["images_seen"]): {key: value for key, value in row.items() if value} for row in rows(stage)}
    assert logged == kept

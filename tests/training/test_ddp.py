"""Two processes on the CPU: both stages, with the weights of one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers import assert_close_relative
from tests.trained import assert_equal, copy, final_weights, last_checkpoint, metrics, snapshot, train

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("autoencoder", "diffusion")


def command(*overrides):
    """`python train.py ...` as a user types it; Lightning starts the second process."""
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "train.py", "experiment=celebahq", "debug=tiny", "logger=csv", *overrides],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


TWO = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2")
AVERAGES = ("model.power_ema=[0.05,0.1]", "snapshots=32")


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """Both stages on two processes: the folder of the runs, that of the ranks' weights, and what was said."""
    folder = tmp_path_factory.mktemp("ddp")
    dump = (
        "plugins=[tests]",
        "+callbacks.dump._target_=tests.callbacks.DumpWeights",
        f"+callbacks.dump.folder={folder}/ranks",
    )
    done = command(*TWO, f"paths.runs={folder}/runs", *dump, *AVERAGES)
    assert done.returncode == 0, done.stderr
    return folder / "runs", folder / "ranks", done.stdout


@pytest.mark.slow
def test_both_stages_finish_and_rank_0_alone_speaks_and_writes(two_processes):
    runs, _, said = two_processes
    assert (runs / "celebahq/model_index.json").is_file()
    for stage in STAGES:
        assert said.count(f"{stage} on 2 x 1 CPU threads") == 1
        assert said.count(f"celebahq/{stage} is finished: ") == 1
        assert sorted(metrics(runs / "celebahq" / stage)) == [8, 16, 24, 32, 40, 48, 56, 64]
    assert said.count("Done. Next:") == 1
    assert [path for path in runs.rglob("*") if path.name.startswith(".")] == []


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_ranks_end_with_equal_weights(two_processes, stage):
    one, other = (torch.load(two_processes[1] / f"{stage}_{rank}.pt", weights_only=True) for rank in (0, 1))
    statistics = ("running_mean", "running_var")  # each rank's discriminator normalises what it has seen itself
    compared = [{key: value for key, value in state.items() if not key.endswith(statistics)} for state in (one, other)]
    assert_equal(*compared)


@pytest.mark.slow
def test_two_processes_train_like_one(two_processes, tmp_path):
    runs = two_processes[0]
    train(tmp_path, "experiment=celebahq", f"autoencoder={runs}/celebahq")
    one, two = (final_weights(folder / "celebahq/diffusion") for folder in (tmp_path, runs))
    for file, weights in one.items():
        for key, value in weights.items():
            # Adam enlarges what is lost in rounding: of latents kept in float16, a few round to the other side.
            assert_close_relative(two[file][key], value, 5e-3)
    rows = [metrics(folder / "celebahq/diffusion") for folder in (tmp_path, runs)]
    for images in (32, 64):
        assert rows[1][images]["val/loss"] == pytest.approx(rows[0][images]["val/loss"], rel=1e-4)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_in_the_same_step(two_processes, tmp_path):
    """With accumulation, and where the ranks compare notes: after eight steps of eight images."""
    arguments = {"_target_": "tests.callbacks.Signal", "stage": "diffusion", "images": 16, "rank": 1}
    interrupt = [f"+callbacks.interrupt.{key}={value}" for key, value in arguments.items()]
    given = (
        f"autoencoder={two_processes[0]}/celebahq",
        f"paths.runs={tmp_path}",
        "max_images=160",
        "validate_every=160",
        "data.batch_size=2",
    )
    stopped = command(*TWO, *given, "plugins=[tests]", *interrupt)
    assert stopped.returncode == 130, stopped.stderr
    assert "stopped and saved at 64 images; the same command continues" in stopped.stdout
    assert last_checkpoint(tmp_path / "celebahq/diffusion")["ldm_lab"]["images_seen"] == 64


@pytest.mark.slow
def test_a_refusal_ends_all_processes_before_anything_is_trained(two_processes, tmp_path):
    """The longer stage 1 would be another autoencoder than the one of the stage 2 that is there."""
    runs = copy(two_processes[0], tmp_path)
    before = snapshot(runs)
    refused = command(*TWO, f"paths.runs={runs}", "max_images=72", *AVERAGES)
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: max_images=72 would train ")
    assert refused.stderr.count("\n") == 1
    assert snapshot(runs) == before

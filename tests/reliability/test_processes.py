"""Several processes are one training: they end with the same weights, and where one of them fails all end at once."""

import itertools
import re
import time

import pytest
import torch

from tests.helpers import contents
from tests.reliability.commands import TWO, Command, python, torchrun
from tests.trained import SMALL, assert_equal, metrics

MINUTE = 60
TINY = ("experiment=celebahq", SMALL, "debug=tiny", "logger=csv", "plugins=[tests]")
STAGES = ("autoencoder", "diffusion")
OTHER = {0: 1, 1: 0}


def fault(**arguments):
    arguments = {"stage": "autoencoder", **arguments}
    target = "+callbacks.fault._target_=tests.reliability.faults.Fault"
    return [target, *(f"+callbacks.fault.{key}={value}" for key, value in arguments.items())]


def assert_all_end(command, rank):
    """Within a minute, with a failure, with a word on which rank it was; and nobody is left."""
    status = command.process.wait(300)
    ended = time.time()
    try:
        assert command.survivors() == []
    finally:
        command.kill()
    gone, said = time.time(), command.said()
    assert status != 0, said
    failed = float(re.search(r"fault at ([\d.]+)", said)[1])
    assert gone - failed < MINUTE, said
    assert re.search(rf"error: rank {rank} \S|(?s:Root Cause.*?rank +: {rank} )", said), said
    print(f"rank {rank} failed; the command ended {ended - failed:.1f} s later, its last process {gone - failed:.1f} s")
    return said


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.soak)])
def test_a_killed_rank_ends_the_others_even_if_they_do_not_wait_for_it(tmp_path, rank):
    """The other one is busy, for minutes, with something that is no collective; loaders are running."""
    faults = fault(rank=rank, what="kill", where="train", busy=OTHER[rank])
    command = Command(
        tmp_path / "log", *python("train.py", *TINY, *TWO, f"paths.runs={tmp_path}", "data.num_workers=1", *faults)
    )
    assert_all_end(command, rank)


WHERE = ("build", "setup", "train", "validation", "save")
CASES = [
    *itertools.product(("kill",), (0, 1), WHERE[1:]),
    ("kill", 1, "build"),  # at rank 0's there is no other process yet
    *itertools.product(("raise",), (0, 1), ("train", "validation")),
    ("raise", 1, "build"),
    ("refuse", 0, "train"),
    ("refuse", 1, "train"),
]


@pytest.mark.soak
@pytest.mark.parametrize(("what", "rank", "where"), CASES)
def test_whatever_becomes_of_a_rank_all_end(tmp_path, what, rank, where):
    faults = fault(rank=rank, what=what, where=where)
    said = assert_all_end(
        Command(tmp_path / "log", *python("train.py", *TINY, *TWO, f"paths.runs={tmp_path}", *faults)), rank
    )
    if what != "kill":
        assert said.count("a fault of this rank") >= 1  # the reason is not lost
    assert "gloo" not in said  # and what only follows from it is not shown


@pytest.mark.soak
@pytest.mark.parametrize("rank", [0, 1])
def test_a_busy_rank_is_ended(tmp_path, rank):
    """As rank 0 is with a checkpoint or a preview, or a rank that waits for its images."""
    faults = fault(rank=rank, what="kill", where="save", busy=OTHER[rank])
    words = python("train.py", *TINY, *TWO, f"paths.runs={tmp_path}", "data.num_workers=2", *faults)
    assert_all_end(Command(tmp_path / "log", *words), rank)


@pytest.mark.soak
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_may_fail_in_the_second_stage(tmp_path, rank):
    faults = fault(stage="diffusion", rank=rank, what="kill", where="train", busy=OTHER[rank])
    assert_all_end(Command(tmp_path / "log", *python("train.py", *TINY, *TWO, f"paths.runs={tmp_path}", *faults)), rank)


@pytest.mark.soak
@pytest.mark.parametrize(("what", "rank"), [("kill", 0), ("kill", 1), ("raise", 1)])
def test_torchrun_ends_all(tmp_path, what, rank):
    faults = fault(rank=rank, what=what, where="train")
    words = torchrun("train.py", *TINY, *TWO, f"paths.runs={tmp_path}", *faults)
    assert_all_end(Command(tmp_path / "log", *words), rank)


@pytest.mark.soak
def test_ranks_do_not_outlive_torchrun(tmp_path):
    words = torchrun("train.py", *TINY, *TWO, f"paths.runs={tmp_path}", "max_images=100000")
    command = Command(tmp_path / "log", *words)
    while "autoencoder on 2 x" not in command.said():
        time.sleep(0.5)
    time.sleep(5)
    command.process.kill()
    try:
        assert command.survivors() == []
    finally:
        command.kill()
    assert "error: torchrun is gone, and so rank 0 ends" in command.said()


@pytest.mark.soak
def test_torchrun_trains_what_lightning_does(tmp_path):
    """Bit for bit, but for times; and the ranks end with the same weights, with codes that were replaced."""
    folders = []
    for name, launch in (("lightning", python), ("torchrun", torchrun)):
        folders.append(tmp_path / name)
        dump = ["+callbacks.dump._target_=tests.callbacks.DumpWeights", f"+callbacks.dump.folder={folders[-1]}/ranks"]
        replacing = "+model.codebook.decay=0.3"  # or a tiny training is too short to replace a code
        words = launch("train.py", *TINY, *TWO, f"paths.runs={folders[-1]}", *dump, replacing)
        command = Command(tmp_path / f"{name}.log", *words)
        assert command.wait() == 0, command.said()
        said = command.said()
        for stage in STAGES:
            assert said.count(f"celebahq/{stage} is finished: ") == 1
        assert said.count("Done. Next:") == 1
        assert_ranks_agree(folders[-1] / "ranks")
    one, other = ({k: v for k, v in contents(f).items() if is_comparable(k)} for f in folders)
    assert one.keys() == other.keys()
    assert [key for key in one if one[key] != other[key]] == []
    for stage in STAGES:
        rows = [metrics(folder / "celebahq" / stage) for folder in folders]
        for images in rows[0]:
            ours, theirs = ({k: v for k, v in row[images].items() if not k.startswith("perf/")} for row in rows)
            assert ours == theirs


def is_comparable(path):
    """Not metrics, which hold times, nor the config, which holds the folder's name, nor what holds these."""
    return not path.endswith(("metrics.csv", "config.yaml", ".ckpt", ".sha256"))


def assert_ranks_agree(folder):
    """Weights, averages, usage of the codes; the discriminator's own running statistics apart."""
    for stage in STAGES:
        states = [torch.load(folder / f"{stage}_{rank}.pt", weights_only=True) for rank in (0, 1)]
        assert_equal(*({k: v for k, v in s.items() if not k.endswith(("running_mean", "running_var"))} for s in states))


@pytest.mark.soak
def test_a_sweep_of_several_processes_is_refused(tmp_path):
    command = Command(tmp_path / "log", *python("train.py", "-m", *TINY, *TWO, f"paths.runs={tmp_path}", "seed=1,2"))
    assert command.wait() == 1
    assert "use a launcher (hydra/launcher=submitit_slurm)" in command.said()

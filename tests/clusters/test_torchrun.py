"""Two machines without a scheduler, one torchrun on each: here both run on this machine."""

import sys
import time

import pytest

from tests.clusters.callbacks import hold
from tests.reliability.commands import Command, free_port
from tests.sampling.test_generate import MODEL
from tests.trained import metrics

TINY = ("debug=tiny", "experiment=avatars/autoencoder", "logger=csv", "callbacks=none", "plugins=[tests]")
TWO = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=1", "trainer.num_nodes=2")
MINUTE = 60
TIME_LIMIT = 900  # seconds, on a busy machine


def start(folder, *words):
    """The same command on both machines."""
    words = ("--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--local-addr=127.0.0.1", *words)
    endpoint = f"--rdzv-endpoint=127.0.0.1:{free_port()}"
    torchrun = (sys.executable, "-m", "torch.distributed.run", endpoint)
    return [Command(folder / f"machine-{number}.log", *torchrun, *words, *TWO) for number in (0, 1)]


def finish(machines):
    assert [machine.process.wait(TIME_LIMIT) for machine in machines] == [0, 0], "".join(m.said() for m in machines)
    assert [machine.survivors() for machine in machines] == [[], []]


@pytest.mark.soak
@pytest.mark.parametrize("killed", [0, 1])
def test_a_machine_that_dies_ends_the_other_and_the_same_command_continues(tmp_path, killed):
    """`killed`: 0 is the machine of the first rank."""
    train = ("train.py", *TINY, f"paths.runs={tmp_path}", *hold(tmp_path, "autoencoder-40"))
    machines = start(tmp_path, *train)
    deadline = time.monotonic() + TIME_LIMIT
    while not (tmp_path / "autoencoder-40").exists():
        assert time.monotonic() < deadline, "".join(machine.said() for machine in machines)
        time.sleep(0.2)
    machines.sort(key=lambda machine: "autoencoder on 2 x" not in machine.said())  # rank 0 speaks
    lost, left = machines[killed], machines[1 - killed]
    lost.kill()
    died = time.monotonic()
    (tmp_path / "go").touch()
    try:
        assert left.process.wait(TIME_LIMIT) != 0
        ended = time.monotonic() - died
        assert left.survivors() == []
    finally:
        left.kill()
    print(f"the machine that was left ended after {ended:.0f} s:\n{left.said()[-800:]}")
    assert ended < MINUTE
    machines = start(tmp_path, *train)
    finish(machines)
    said = "".join(machine.said() for machine in machines)
    assert "continuing" in said
    assert list(metrics(tmp_path / "avatars/autoencoder")) == list(range(8, 65, 8))


@pytest.mark.soak
def test_two_machines_draw_each_sample_once(tmp_path):
    finish(start(tmp_path, "sample.py", f"ckpt={MODEL}", "sampler.steps=2", "num_samples=40", f"output={tmp_path}/out"))
    assert len(list((tmp_path / "out/images").glob("*.png"))) == 40

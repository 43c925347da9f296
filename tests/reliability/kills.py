"""Runs that are killed and started again: `train.py` in processes forked from one that has imported everything.

A moment is named by an event: a hook of Lightning or a change to a file of the run. The process (with several: the
group of all ranks) gets its SIGKILL from inside, at that very event or a little later, so that nothing is left to luck
which a test wants to be sure of. The command is the one that a user types; nothing in it says what will happen.
"""

import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning.pytorch.trainer import call

from ldm_lab.config import stages  # noqa: F401  it imports what trains
from ldm_lab.training.diffusion_module import DiffusionModule
from tests.reliability.commands import free_port
from train import job

ROOT = Path(__file__).resolve().parents[2]
FILE_EVENTS = ("open", "os.rename", "os.link", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
TIME_LIMIT = 900  # seconds, for one start, in which networks may be compiled

# Its first process imports this module, and with it torch and Lightning; each start is a fork of that.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload([__name__])

SEED = int(os.environ.get("KILLS_SEED", "0"))  # of the moments that tests draw
TALLY = {"kills": 0, "kills of two processes": 0, "images repeated at most": 0}  # of this session, for its report


@dataclass(frozen=True)
class Moment:
    """When a start is killed: `delay` seconds after event number `count` among those that `pattern` is found in.

    Events are lines: "rename autoencoder/checkpoints/last.ckpt" (about to be done, to this name), "hook diffusion
    on_train_batch_end 32" (after 32 images), "encode diffusion 0". In names of files, PID stands for the process's.
    """

    pattern: str = ""
    count: int = 1
    delay: float = 0.0


@dataclass(frozen=True)
class Start:
    """What came of one start.

    Attributes:
        killed: whether it was.
        stage: that was being trained at the end.
        images: that this stage had seen.
        resumed: stage -> images at which it continued, as the output says.
        events: how many there were.
        output: what it has printed.
    """

    killed: bool
    stage: str
    images: int
    resumed: dict[str, int]
    events: int
    output: str


def start(runs, overrides, moment=None, world_size=1):
    """Run `train.py paths.runs=<runs> <overrides>` to its end or to its `moment`.

    Raises:
        AssertionError: it has failed of itself, or takes too long.
    """
    runs = Path(runs)
    runs.mkdir(parents=True, exist_ok=True)
    log, journal = runs.parent / f"{runs.name}.log", runs.parent / f"{runs.name}.events"
    command = [*overrides, f"paths.runs={runs}"]
    port = free_port()
    ranks = []
    for rank in range(world_size):
        leader = ranks[0].pid if ranks else 0
        environment = rank_environment(rank, world_size, port) if world_size > 1 else {}
        arguments = (command, environment, leader, str(log), str(journal), str(runs), moment)
        ranks.append(processes.Process(target=_train, args=arguments))
        ranks[-1].start()
        while rank == 0 and ranks[0].is_alive() and os.getpgid(ranks[0].pid) != ranks[0].pid:
            time.sleep(0.001)
    deadline = time.monotonic() + TIME_LIMIT
    for process in ranks:
        process.join(max(0, deadline - time.monotonic()))
    codes = [process.exitcode for process in ranks]
    if None in codes:
        os.killpg(ranks[0].pid, signal.SIGKILL)
    output = log.read_text(encoding="utf-8", errors="replace")
    killed = codes == [-signal.SIGKILL] * world_size
    assert killed or codes == [0] * world_size, f"{moment}: exit codes {codes}\n{output}"
    lines = journal.read_text(encoding="utf-8").splitlines()
    hooks = [line.split() for line in lines if line.startswith("hook")]
    stage, images = (hooks[-1][1], int(hooks[-1][3])) if hooks else ("", 0)
    TALLY["kills"] += killed
    TALLY["kills of two processes"] += killed and world_size > 1
    found = re.findall(r"continuing \S*/(\w+) at ([\d,]+) of", output)
    resumed = {name: int(number.replace(",", "")) for name, number in found}
    return Start(killed, stage, images, resumed, len(lines), output)


def rank_environment(rank, world_size, port):
    """What torchrun tells its processes."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    numbers |= {"GROUP_RANK": 0, "MASTER_PORT": port, "MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "kills"}
    return {key: str(value) for key, value in numbers.items()}


def _train(command, environment, leader, log, journal, runs, moment):
    """A start, in a process of its own."""
    os.setpgid(0, leader)
    os.chdir(ROOT)
    os.environ.update(environment)
    rank = environment.get("RANK", "0")
    with open(log, "w" if rank == "0" else "a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["train.py", *command]
    torch.set_num_threads(1)
    if rank == "0":
        Watch(runs, journal, moment).begin()
    job(command)


class Watch:
    """Notes the events of this process and kills its group at the moment that is given.

    Args:
        runs: the folder in which changes of files are events.
        journal: where events are noted, a line each.
        moment: None: only note.
    """

    def __init__(self, runs, journal, moment):
        self.runs, self.moment, self.left = f"{runs}/", moment, moment.count if moment else 0
        self.journal = os.open(journal, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self.process = os.getpid()

    def begin(self):
        sys.addaudithook(self._on_audit)
        inner, encode = call._call_callback_hooks, DiffusionModule.encode

        def hook(trainer, name, *arguments, **keywords):
            self.event(f"hook {trainer.lightning_module.stage} {name} {trainer.lightning_module.images_seen}")
            return inner(trainer, name, *arguments, **keywords)

        def noted_encode(module, *arguments):
            self.event(f"encode diffusion {module.images_seen}")
            return encode(module, *arguments)

        call._call_callback_hooks, DiffusionModule.encode = hook, noted_encode

    def _on_audit(self, event, arguments):
        if event not in FILE_EVENTS or os.getpid() != self.process:
            return
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & WRITING):
            return
        path = str(arguments[1 if event in ("os.rename", "os.link") else 0])
        if path.startswith(self.runs):
            name = path[len(self.runs) :].partition("/")[2].replace(str(self.process), "PID")
            self.event(f"{event.removeprefix('os.')} {name}")

    def event(self, line):
        os.write(self.journal, f"{line}\n".encode())
        if self.moment is None or not re.search(self.moment.pattern, line):
            return
        self.left -= 1
        if self.left == 0 and self.moment.delay:
            threading.Timer(self.moment.delay, kill_group).start()
        elif self.left == 0:
            kill_group()


def kill_group():
    """The plug is pulled."""
    os.killpg(0, signal.SIGKILL)
    time.sleep(60)  # it takes a moment; nothing may follow

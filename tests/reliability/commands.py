"""Commands as users type them, in processes that can be found again whatever becomes of them."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OF_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LDM_LAB_LAUNCHER")
TWO = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2")
ORPHANED = 20.0  # seconds in which loader processes notice that they are
TIME_LIMIT = 300  # seconds for one command, on a busy machine


class Command:
    """A command that was started; what it says goes to `<log>`.

    It and all its children, grandchildren ... bear a mark in their environment.
    """

    def __init__(self, log, *words):
        self.mark = f"LDM_LAB_TEST={uuid.uuid4().hex}"
        environment = {key: value for key, value in os.environ.items() if key not in OF_RANKS}
        environment |= dict([self.mark.split("=")], PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
        self.log = Path(log)
        with open(self.log, "w", encoding="utf-8") as file:
            self.process = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)

    def wait(self):
        """Its exit status. With the last of its processes everything is over."""
        try:
            return self.process.wait(TIME_LIMIT)
        finally:
            self.kill()

    def kill(self):
        for process in self.processes():
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(process, signal.SIGKILL)
        self.process.wait()

    def processes(self):
        """All processes that live, the first one first."""
        return sorted(int(path.parent.name) for path in Path("/proc").glob("[0-9]*/environ") if self._is_marked(path))

    def _is_marked(self, environ):
        try:
            return self.mark.encode() in environ.read_bytes().split(b"\0")  # of a zombie it is empty
        except OSError:
            return False

    def survivors(self):
        """Processes that are still there when the loaders have had the time to notice."""
        deadline = time.monotonic() + ORPHANED
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.2)
        return left

    def said(self):
        return self.log.read_text(encoding="utf-8", errors="replace")


def free_port():
    """A port that nobody listens at."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def python(script, *overrides):
    """The words of `python <script> ...`."""
    return sys.executable, script, *overrides


def torchrun(script, *overrides):
    """The words of `torchrun --nproc-per-node 2 <script> ...`."""
    return sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script, *overrides

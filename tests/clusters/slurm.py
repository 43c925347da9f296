"""A real Slurm on this machine: a controller and two nodes, in one folder; needs root and Debian's slurm-wlm."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from tests.reliability.commands import OF_RANKS, ROOT, free_port

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol", "squeue", "sinfo")
# The resolver reads these names as 127.0.0.1 and 127.0.0.2: ranks find the first node by name, without /etc/hosts.
NODES = ("0x7f000001", "0x7f000002")
TASKS = 2  # on each node
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
PATIENCE = 250.0  # seconds for what Slurm does by itself
TIME_LIMIT = 1800.0  # seconds for a job, on a busy machine
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
FirstJobId={first}
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=60
MessageTimeout=60
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE
"""
NODE = "NodeName={node} NodeAddr=127.0.0.1 NodeHostname={host} Port={port} CPUs=4 Gres=gpu:2\n"


def why_not():
    """Why no Slurm can be started here; empty if it can."""
    if missing := [name for name in PROGRAMS if not shutil.which(name)]:
        return f"no {', '.join(missing)} on PATH: apt-get install slurm-wlm"
    return "" if os.geteuid() == 0 else "the daemons of a Slurm need root"


class Slurm:
    """`start` starts the daemons, `stop` ends them with all jobs: all their processes bear `SLURM_CONF`.

    Args:
        folder: takes configuration, states and logs.
    """

    def __init__(self, folder):
        self.folder, host = Path(folder), socket.gethostname()
        config = self.folder / "slurm.conf"
        nodes = [NODE.format(node=node, host=host, port=free_port()) for node in NODES]
        # Lightning's rendezvous takes its port from the number of the job.
        text = CONFIG.format(host=host, port=free_port(), first=free_port(), folder=self.folder)
        config.write_text(text + "".join(nodes))
        (self.folder / "gres.conf").write_text("Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n")  # they are counted
        inherited = {k: v for k, v in os.environ.items() if k not in OF_RANKS and not k.startswith("SLURM_")}
        path = f"{Path(sys.executable).parent}:{inherited['PATH']}"
        self.environment = {**inherited, "SLURM_CONF": str(config), "PATH": path, "OMP_NUM_THREADS": "1"}
        self.daemons = {}
        for folder in ("state", *(f"spool-{node}" for node in NODES)):
            (self.folder / folder).mkdir()

    def start(self):
        self._start("slurmctld", "slurmctld", "-D", "-c")
        for node in NODES:
            self.start_node(node)

    def _start(self, name, *words, **variables):
        with open(self.folder / f"{name}.out", "a", encoding="utf-8") as log:
            environment = {**self.environment, **variables}
            self.daemons[name] = subprocess.Popen(words, env=environment, cwd=self.folder, stdout=log, stderr=log)

    def start_node(self, node):
        self._start(node, "slurmd", "-D", "-N", node, SLURMD_NODENAME=node)
        self.until(lambda: node in self.call("sinfo", "-hN", "-t", "idle", "-o", "%N", check=False), f"{node} is up")

    def kill_node(self, node):
        """The plug is pulled: the daemon of the node and all that runs there are gone."""
        for process in self._processes("SLURM_CONF", f"SLURMD_NODENAME={node}"):
            _kill(process)
        self.daemons.pop(node).wait()

    def call(self, *words, check=True, **variables):
        """Run a command, such as `sbatch`, in the repository's root; returns what it prints."""
        environment = {**self.environment, **variables}
        done = subprocess.run(words, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0 or not check, f"{' '.join(words)}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, log, *words, **variables):
        """`sbatch`, for two nodes of two tasks unless `words` say otherwise; returns the number of the job."""
        shape = ("--nodes=2", f"--ntasks-per-node={TASKS}", f"--gpus-per-node={TASKS}", "--cpus-per-task=1")
        return self.call("sbatch", "--parsable", f"--output={log}", *shape, *words, **variables).strip()

    def state(self, job):
        """`PENDING`, `RUNNING`, `COMPLETED`, ... and the number of requeues."""
        pairs = dict(pair.split("=", 1) for pair in self.call("scontrol", "show", "job", job).split() if "=" in pair)
        return pairs["JobState"], int(pairs["Restarts"])

    def let_time_end(self, job):
        """Give a running job one or two minutes more: Slurm looks at the clock twice a minute."""
        self.call("scontrol", "update", f"job={job}", f"timelimit={self._minutes(job) + 2}")

    def _minutes(self, job):
        hours, minutes, _ = self.call("squeue", "-h", "-j", job, "-o", "0:0:%M").split(":")[-3:]
        return 60 * int(hours) + int(minutes)

    def reached(self, job, mark):
        """Wait until the running job has made the file `mark`."""
        self.until(lambda: mark.exists() or self.state(job)[0] in OVER, mark.name, TIME_LIMIT)
        assert mark.exists(), self.call("scontrol", "show", "job", job)

    def ended(self, job):
        """The state in which the job has ended; waits for it."""
        self.until(lambda: self.state(job)[0] in OVER, f"job {job} has ended", TIME_LIMIT)
        return self.state(job)[0]

    def until(self, condition, what, patience=PATIENCE):
        deadline = time.monotonic() + patience
        while not condition():
            jobs = "" if time.monotonic() < deadline else self.call("scontrol", "show", "job")
            assert not jobs, f"{what}: not within {patience} s\n{jobs}"
            time.sleep(0.5)

    def _processes(self, *marks):
        """Those whose environment has all of `marks`."""
        marks = [mark if "=" in mark else f"{mark}={self.environment[mark]}" for mark in marks]
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if {mark.encode() for mark in marks} <= set(path.read_bytes().split(b"\0")):
                    yield int(path.parent.name)

    def stop(self):
        """No job and no daemon is left."""
        for process in self._processes("SLURM_CONF"):
            _kill(process)
        for daemon in self.daemons.values():
            daemon.wait()


def _kill(process):
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)

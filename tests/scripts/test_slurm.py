"""`scripts/slurm.sh`, with a `srun` and a `scontrol` that write down their calls; and what train.py says to Slurm."""

import os
import subprocess
from pathlib import Path

import pytest

from ldm_lab.training.launcher import check_tasks

SCRIPT = Path(__file__).resolve().parents[2] / "scripts/slurm.sh"
JOB = {
    "SLURM_JOB_ID": "4711", "SLURM_NTASKS": "16", "SLURM_NTASKS_PER_NODE": "8", "SLURM_JOB_NUM_NODES": "2",
    "SLURM_GPUS_ON_NODE": "8",
}  # fmt: skip


@pytest.fixture
def submit(tmp_path):
    """Run the script as a job; returns its status, the calls of srun and scontrol, and what it said on stderr."""

    def run(status=0, without=(), script=(), **changes):
        folder = tmp_path / "bin"
        folder.mkdir()
        for name, code in (("srun", status), ("scontrol", 0)):
            if name not in without:
                (folder / name).write_text(f'#!/bin/bash\necho {name} "$@" >> {tmp_path}/calls\nexit {code}\n')
                (folder / name).chmod(0o755)
        environment = {key: value for key, value in {**JOB, **changes}.items() if value is not None}
        done = subprocess.run(
            ["/bin/bash", str(SCRIPT), *script, "experiment=celebahq", "data.root=/a b"],
            env={**environment, "PATH": str(folder), "SLURM_SUBMIT_DIR": str(tmp_path)},
            capture_output=True, text=True, timeout=20, check=False,
        )  # fmt: skip
        calls = tmp_path / "calls"
        return done.returncode, calls.read_text().splitlines() if calls.exists() else [], done.stderr

    return run


def test_all_tasks_are_started_by_srun_with_the_settings_that_fit_them(submit):
    status, calls, _ = submit()
    assert status == 0
    assert calls == [
        "srun --kill-on-bad-exit=1 python train.py experiment=celebahq data.root=/a b"
        " trainer=ddp trainer.devices=8 trainer.num_nodes=2"
    ]


def test_another_script_may_be_named_first(submit):
    _, calls, _ = submit(script=("sample.py",))
    assert calls[0].startswith("srun --kill-on-bad-exit=1 python sample.py experiment=celebahq data.root=/a b trainer=")


@pytest.mark.parametrize(("status", "again"), [(138, True), (143, False), (130, False), (1, False)])
def test_only_the_end_of_the_time_asks_for_another_turn(submit, status, again):
    ended, calls, _ = submit(status)
    assert ended == status
    assert calls[1:] == (["scontrol requeue 4711"] if again else [])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"SLURM_JOB_ID": None}, "error: this is not a Slurm job: start it with sbatch scripts/slurm.sh"),
        ({"without": ("srun",)}, "error: srun is not on PATH"),
        ({"SLURM_NTASKS": "5"}, "error: 5 tasks do not fit 2 nodes of 8: set --ntasks-per-node"),
        ({"SLURM_NTASKS_PER_NODE": None}, "error: set --ntasks-per-node"),
        ({"SLURM_GPUS_ON_NODE": "4"}, "error: 8 tasks a node for 4 GPUs"),
    ],
)
def test_what_would_hang_is_refused_in_one_line(submit, changes, message):
    status, calls, said = submit(**changes)
    assert status == 1
    assert calls == []
    assert message in said
    assert said.count("\n") == 1


def test_the_header_asks_for_what_the_script_relies_on():
    text = SCRIPT.read_text()
    for option in ("--nodes=2", "--ntasks-per-node=8", "--signal=USR1@120", "--requeue", "--open-mode=append"):
        assert f"#SBATCH {option}" in text


# --- in train.py


@pytest.fixture
def environment(monkeypatch):
    """Set the variables of Slurm and torchrun, and only those given."""
    for key in [key for key in os.environ if key.startswith(("SLURM_", "TORCHELASTIC_"))] + ["RANK", "LOCAL_RANK"]:
        monkeypatch.delenv(key, raising=False)

    def put(**values):
        for key, value in values.items():
            monkeypatch.setenv(key, value)

    return put


STEP = {"SLURM_NTASKS": "16", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_JOB_NAME": "ldm_lab"}


@pytest.mark.parametrize(
    ("variables", "devices", "nodes"),
    [
        ({}, 8, 1),
        (STEP, 8, 2),
        ({**STEP, "SLURM_NTASKS": "1"}, 1, 1),
        ({**STEP, "SLURM_JOB_NAME": "bash"}, 1, 1),  # a shell that Slurm has given
        ({**STEP, "SLURM_NTASKS": "2", "TORCHELASTIC_RUN_ID": "x"}, 8, 2),  # one torchrun a machine
    ],
)
def test_tasks_that_fit_pass(environment, variables, devices, nodes):
    environment(**variables)
    check_tasks(devices, nodes)


@pytest.mark.parametrize(
    ("variables", "devices", "nodes", "message"),
    [
        (STEP, 8, 1, r"^Slurm has 16 task\(s\) .* trainer\.devices=8 on trainer\.num_nodes=1 need 8"),
        ({**STEP, "SLURM_NTASKS": "1"}, 8, 1, r"^Slurm has 1 task\(s\) .* need 8"),
        (STEP, 1, 1, r"^Slurm has 16 task\(s\) .* need 1"),  # sixteen trainings in one folder
        ({**STEP, "SLURM_STEP_ID": None}, 8, 2, "^Slurm has 16 tasks, but only one process: put srun before python"),
    ],
)
def test_tasks_that_do_not_are_refused_by_the_first_process_alone(environment, variables, devices, nodes, message):
    variables = {key: value for key, value in variables.items() if value is not None}
    environment(**variables)
    with pytest.raises(ValueError, match=message):
        check_tasks(devices, nodes)
    environment(SLURM_PROCID="3")
    with pytest.raises(SystemExit) as end:
        check_tasks(devices, nodes)
    assert end.value.code == 1

"""Waiting threads sleep: with every entry, before OpenMP is loaded, unless the environment says otherwise."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ldm_lab.utils.threads import KNOWN

ROOT = Path(__file__).resolve().parents[2]
# Shows what OpenMP reads when torch is loaded; no test looks at torch itself.
LOAD = "import torch" if sys.platform == "linux" else "raise SystemExit"


def spins(entry, tmp_path, **environment):
    """How often a waiting thread looks before it sleeps, in a process of `entry`, as OpenMP tells."""
    environment = {**{k: v for k, v in os.environ.items() if k not in KNOWN}, **environment}
    environment |= {"OMP_DISPLAY_ENV": "verbose", "PYTHONPATH": str(ROOT)}
    code = f"import sys; sys.argv = ['x', '--help']; {entry}; {LOAD}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if "GOMP_SPINCOUNT" in line]
    if not lines:
        pytest.skip("torch is built with another OpenMP than GNU's")
    return int(lines[0].split("'")[1])


@pytest.mark.parametrize(
    "entry", ["import train; train.run('train', train.job, '')", "from ldm_lab.__main__ import main; main([])"]
)
def test_threads_that_wait_sleep(entry, tmp_path):
    assert spins(entry, tmp_path) == 0


def test_the_environment_has_the_last_word(tmp_path):
    assert spins("from ldm_lab.__main__ import main; main([])", tmp_path, GOMP_SPINCOUNT="777") == 777

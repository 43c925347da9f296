"""The command line of `scripts/gpu_check.sh`: run all parts within a time budget, write JSON and Markdown."""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path

from ldm_lab.utils.errors import UserError, reporting
from ldm_lab.utils.signals import listen
from ldm_lab.utils.terminal import lenient
from scripts.gpu_check import report
from scripts.gpu_check.parts import parts
from scripts.gpu_check.runner import SECONDS, Check, run_all

PRELOADED = ("ldm_lab.config.stages", "ldm_lab.tools.benchmark.command")


def main(argv: list[str]) -> int:
    """Run the check; returns its exit status. Raises `ValueError` for a folder that holds an earlier check."""
    options = parse(argv)
    out = (options.out or Path("runs/gpu_check", time.strftime("%Y%m%d-%H%M%S"))).absolute()
    if (out / report.JSON).exists():
        raise UserError(f"--out {out}: holds the result of an earlier check: name another folder")
    (out / "logs").mkdir(parents=True, exist_ok=True)
    # A process that has forked cannot use CUDA if its parent has only looked for it, so children there start anew. On
    # the CPU they inherit the imports, which take longer than the small parts themselves.
    method = "spawn" if options.device == "cuda" else "fork"
    if method == "fork":
        for name in PRELOADED:
            importlib.import_module(name)
    with tempfile.TemporaryDirectory(prefix="gpu_check", ignore_cleanup_errors=True) as work:
        check = Check(options.device, options.small, Path(work), out)
        result = run_all(parts(check.small), check, options.seconds, multiprocessing.get_context(method))
    print(report.markdown(result))
    print(f"written to {out}")
    return 0 if report.passed(result) else 1


def parse(argv: list[str]) -> argparse.Namespace:
    """The flags, checked."""
    parser = argparse.ArgumentParser("scripts/gpu_check.sh", description=__doc__)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="of the results (default: runs/gpu_check/<time>)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: %(default)s")
    parser.add_argument("--small", action="store_true", help="tiny networks: whether all parts run, not how fast")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all parts together (default: %(default)s)")
    options = parser.parse_args(argv)
    if options.seconds <= 0:
        raise UserError(f"--seconds {options.seconds:g}: must be more than 0")
    return options


if __name__ == "__main__":
    listen()
    with lenient(), reporting("running gpu_check"):
        status = main(sys.argv[1:])
    sys.exit(status)

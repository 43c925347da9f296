"""Runs the parts of a check, each in a process of its own with a time limit, and keeps within the time of the whole."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

from ldm_lab.utils.signals import STOPPING
from scripts.gpu_check import report

SECONDS = 570  # for all parts, unless told otherwise: with its start and its end a check takes ten minutes at most
TAIL = 15  # lines of the log of a part that failed
Row = dict[str, Any]


@dataclass(frozen=True)
class Check:
    """What every part is told.

    Attributes:
        device: "cuda" or "cpu".
        small: whether networks are tiny: to try the parts, not to measure.
        work: a folder for everything that does not stay: runs, caches, temporary files.
        out: the folder of the results.
        ends: when the part is stopped, as `time.time()` counts.
    """

    device: str
    small: bool
    work: Path
    out: Path
    ends: float = 0.0

    @property
    def left(self) -> float:
        """Seconds until the part is stopped."""
        return self.ends - time.time()


@dataclass(frozen=True)
class Part:
    """One part of the check.

    Attributes:
        name: of its log.
        run: yields rows of the table, each as soon as it is known: a row that is there is kept whatever comes after it.
            A row has `what`, and any of `seconds`, `images_per_s`, `share_of_peak`, `mb_per_image`, `ratio`, `notes`,
            `details` (in the JSON alone), `failed` and `not_run` (a reason).
        rows: the `what` of each row that it owes.
        limit: seconds after which it is stopped, of `SECONDS` for all parts; with more for all, it has more, too.
        least: seconds without which it is not begun.
    """

    name: str
    run: Callable[[Check], Iterator[Row]]
    rows: tuple[str, ...]
    limit: float
    least: float = 0.0


def run_all(parts: Sequence[Part], check: Check, seconds: float, context: BaseContext) -> dict[str, Any]:
    """Run one part after the other; what is known is on disk after each.

    Nothing is measured where the first part fails: it looks for the device.

    Args:
        parts: what is run, the most important first.
        check: what they are told.
        seconds: for all of them together.
        context: of `multiprocessing`: how their processes start.
    """
    started = time.monotonic()
    result: dict[str, Any] = {"device": check.device, "small": check.small, "seconds_allowed": seconds, "parts": []}
    for part in parts:
        left = seconds - (time.monotonic() - started)
        if result["parts"] and result["parts"][0]["status"] == "failed":
            found = not_run(part, f"{parts[0].name} failed")
        elif left < max(part.least, 1):
            found = not_run(part, f"no time left ({max(left, 0):.0f} s of {seconds:g} s)")
        else:
            print(f"{part.name} ...", end=" ", flush=True)
            found = run(part, check, min(part.limit * max(1, seconds / SECONDS), left), context)
            print(f"{found['status']}, {found['seconds']:.0f} s", flush=True)
        result["parts"].append(found)
        result["seconds"] = time.monotonic() - started
        report.write(result, check.out)
    return result


def run(part: Part, check: Check, limit: float, context: BaseContext) -> dict[str, Any]:
    """Run a part in a process of its own, for at most `limit` seconds, with its output in a log."""
    log, rows = check.out / "logs" / f"{part.name}.log", check.work / f"{part.name}.jsonl"
    check, started = replace(check, ends=time.time() + limit), time.monotonic()
    process = context.Process(target=_inside, args=(part.run, check, log, rows), name=part.name)
    process.start()
    try:
        process.join(limit)
        late = process.is_alive()
    finally:
        _end(process)
    text = rows.read_text(encoding="utf-8") if rows.exists() else ""
    found = [json.loads(line) for line in text.rpartition("\n")[0].splitlines()]  # the last line may be half a line
    missing = [name for name in part.rows if name not in {row["what"] for row in found}]
    reason = _reason(late, limit, process.exitcode, log) or ("its process ended without this row" if missing else None)
    found += [{"what": name, "failed": reason} for name in missing]
    ended = {"name": part.name, "seconds": time.monotonic() - started, "rows": found}
    if reason or any("failed" in row for row in found):
        return {**ended, "status": "failed", "reason": reason or "see its rows", "tail": _tail(log)}
    return {**ended, "status": "not run" if all("not_run" in row for row in found) else "passed"}


def not_run(part: Part, reason: str) -> dict[str, Any]:
    """What is said of a part that was not begun."""
    rows = [{"what": name, "not_run": reason} for name in part.rows]
    return {"name": part.name, "status": "not run", "seconds": 0.0, "reason": reason, "rows": rows}


def _inside(run: Callable[[Check], Iterator[Row]], check: Check, log: Path, rows: Path) -> None:
    """The process of a part: the leader of a group, with its output in `log` and its temporary files in the work."""
    os.setsid()
    for number in STOPPING:
        signal.signal(number, signal.SIG_DFL)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = sys.stderr = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    folders = {"TMPDIR": "tmp", "LDM_LAB_CACHE": "cache", "TORCHINDUCTOR_CACHE_DIR": "inductor"}
    for key, name in folders.items():
        os.environ[key] = str(check.work / name)
    (check.work / "tmp").mkdir(exist_ok=True)
    tempfile.tempdir = None  # it is chosen again
    with open(rows, "w", encoding="utf-8") as file:
        for row in run(check):
            file.write(json.dumps(row) + "\n")
            file.flush()


def _end(process: multiprocessing.Process) -> None:
    """End a process and those that it has started: loaders, compilers."""
    with contextlib.suppress(OSError):  # there is none left
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()


def _reason(late: bool, limit: float, status: int, log: Path) -> str | None:
    """Why a part failed, in one line; None: its process ended well."""
    if late:
        return f"its time limit of {limit:.0f} s was reached"
    if status < 0:
        return f"its process was ended by {signal.Signals(-status).name}"
    return (_tail(log) or [f"its process ended with status {status}"])[-1] if status else None


def _tail(log: Path) -> list[str]:
    """The last lines of a log; a progress bar writes its states one over the other."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    return [line.rstrip() for line in text.replace("\r", "\n").splitlines() if line.strip()][-TAIL:]

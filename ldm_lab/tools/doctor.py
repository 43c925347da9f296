"""Say what is wrong with a training: latents, codebook, discriminator, numbers, data, learning, speed.

Each line is a question with the value that was measured, the range of healthy runs, and a verdict: `ok`, `look`, which
is unusual, or `BAD`; below it what to change. What was not logged cannot be judged and is marked with a dash. It needs
no more than a run leaves behind and may be asked while it trains. The exit status is 1 if something is bad, else 0.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ldm_lab.runs.diagnosis.checks import diagnose
from ldm_lab.runs.diagnosis.finding import BAD, LOOK, OK, UNKNOWN, Finding, Readings
from ldm_lab.runs.diagnosis.folder import left_out, sheet
from ldm_lab.runs.record import RunRecord, StageRecord, read_run
from ldm_lab.utils.reading import LoadError

MARKS = {OK: "ok", LOOK: "look", BAD: "BAD", UNKNOWN: "-"}


def main(argv: list[str]) -> None:
    """Print the findings; exit with status 1 if something is bad. Raises `LoadError` for a folder that is no run."""
    text = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m ldm_lab doctor", description=__doc__, formatter_class=text)
    parser.add_argument("run", metavar="RUN", type=Path, help="a run's folder, or that of one stage")
    findings = examine(read_run(parser.parse_args(argv).run))
    for record, found in findings:
        print(heading(record))
        for finding in found:
            print("\n".join(lines(finding)))
    counts = {verdict: sum(f.verdict == verdict for _, found in findings for f in found) for verdict in MARKS}
    print(f"{counts[BAD]} bad, {counts[LOOK]} to look at, {counts[OK]} ok, {counts[UNKNOWN]} not logged")
    if counts[BAD]:
        sys.exit(1)


def examine(run: RunRecord) -> list[tuple[StageRecord, list[Finding]]]:
    """All findings by stage. Raises `LoadError` if no stage has a metric."""
    if not any(record.curves for record in run.stages.values()):
        raise LoadError(f"{run.folder}: nothing was measured yet: no stage has a metrics.csv with a row in it")
    found = []
    for record in run.stages.values():
        of_folder = [finding for finding in (sheet(record), left_out(record)) if finding]
        found.append((record, [*diagnose(Readings.of(record)), *of_folder]))
    return found


def heading(record: StageRecord) -> str:
    """A heading with the progress of a stage."""
    state = "finished" if record.status.get("finished") is True else "not finished"
    planned = record.config.get("max_images")
    of = f" of {planned:,}" if isinstance(planned, int) else ""
    return f"{record.folder}: {record.images_seen:,}{of} images, {state}"


def lines(finding: Finding) -> list[str]:
    """A finding, and the advice below it."""
    mark = f"  {MARKS[finding.verdict]:4}  {finding.check:28}"
    healthy = f" (healthy: {finding.healthy})" if finding.verdict != UNKNOWN and finding.healthy else ""
    advice = [f"{'':8}{finding.advice}"] if finding.verdict in (LOOK, BAD) and finding.advice else []
    return [f"{mark}{finding.measured}{healthy}", *advice]

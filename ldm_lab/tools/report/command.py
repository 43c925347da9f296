"""Show runs side by side on one HTML page: which is better and by how much, curves, pictures, settings.

Everything is in the file, pictures too: it opens from disk and loads nothing. It is made of what runs leave behind
(metrics.csv, samples/, eval/*.json, config.yaml), and says of each number in which file and row it stands. Numbers that
do not compare, as those of different held-out images, are shown and not compared.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ldm_lab.runs.record import RunRecord, read_run
from ldm_lab.tools.report.page import page
from ldm_lab.tools.report.pictures import Budget
from ldm_lab.utils.errors import UserError
from ldm_lab.utils.writing import replacing

MEGABYTE = 1e6


def main(argv: list[str]) -> None:
    """Write the page. Raises `UserError` for a folder that is no run, a run without metrics, or an existing file."""
    options = parse(argv)
    text = page(read(options.runs), Budget(options.pictures, options.width, options.quality))
    with replacing(options.output) as temporary:
        temporary.write_bytes(text.encode("utf-8", "backslashreplace"))  # folder names may not be valid text
    size = options.output.stat().st_size / MEGABYTE
    print(f"{options.output}: {len(options.runs)} run(s), {size:.1f} MB; open it in a browser")


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse and check the flags. Raises `UserError`, which names the flag."""
    text = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m ldm_lab report", description=__doc__, formatter_class=text)
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="a run's folder, or that of one stage")
    parser.add_argument("--output", type=Path, metavar="FILE.html", default=Path("report.html"), help="a new file")
    shown = "pictures of each kind and run, evenly over the training (default: %(default)s; 0: none)"
    parser.add_argument("--pictures", type=int, default=Budget.steps, help=shown)
    wide = "pixels; wider pictures are scaled down (default: %(default)s)"
    parser.add_argument("--width", type=int, default=Budget.width, help=wide)
    quality = "of pictures as WebP, 1 to 100; a PNG that is smaller stays one (default: %(default)s)"
    parser.add_argument("--quality", type=int, default=Budget.quality, help=quality)
    options = parser.parse_args(argv)
    for flag, low, high in (("pictures", 0, 10_000), ("width", 16, 10_000), ("quality", 1, 100)):
        if not low <= (value := getattr(options, flag)) <= high:
            raise UserError(f"--{flag} {value}: must be from {low:,} to {high:,}")
    if options.output.exists() or not options.output.parent.is_dir():
        raise UserError(f"--output {options.output}: must be a new file in a folder that is there")
    return options


def read(folders: list[Path]) -> list[RunRecord]:
    """The records of the runs. Raises `UserError` for a repeated run, `LoadError` for a folder that is no run."""
    runs = [read_run(folder) for folder in folders]
    places = [run.folder.resolve() for run in runs]
    for folder, place in zip(folders, places, strict=True):
        if places.count(place) > 1:
            raise UserError(f"{folder}: is named twice; compare it with another run")
    return runs

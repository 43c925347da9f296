"""Reads the files of a run: settings, metrics, pictures, evaluations. Writes nothing.

<run>/<stage>/config.yaml    settings
<run>/<stage>/metrics.csv    a row for each number of images seen
<run>/<stage>/status.json    whether the stage is finished
<run>/<stage>/data.npz       hashes of the stage's images
<run>/<stage>/samples/       pictures, `<name>_<images seen>.png`
<run>/eval/*.json            evaluations, see `Evaluation`
"""

from __future__ import annotations

import csv
import math
import re
import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from ldm_lab.runs.stages import STAGES
from ldm_lab.utils import shell
from ldm_lab.utils.errors import UserError, first_line
from ldm_lab.utils.reading import LoadError, read_json, read_yaml
from ldm_lab.utils.version import FORMAT_KEY

AXIS = "images_seen"
EVALUATIONS = "eval"
MAX_PIXELS = 2**26  # of a picture; the folder may come from a stranger
PICTURE = re.compile(r"(?P<name>.+)_(?P<images>\d{9,})\.png")

Row = dict[str, str]
Curve = list[tuple[int, float]]


@dataclass(frozen=True)
class StageRecord:
    """The files of one stage, each read at its first use.

    Attributes:
        folder: the stage's folder.
        stage: "autoencoder" or "diffusion".
    """

    folder: Path
    stage: str

    @cached_property
    def config(self) -> dict[str, Any]:
        """All settings, resolved. Raises `LoadError` if they cannot be read."""
        return {key: value for key, value in read_yaml(self.folder / "config.yaml").items() if key != FORMAT_KEY}

    @cached_property
    def status(self) -> dict[str, Any]:
        """`finished`, `max_images` and the last metrics; empty before the first step."""
        path = self.folder / "status.json"
        return read_json(path) if path.is_file() else {}

    @cached_property
    def curves(self) -> dict[str, Curve]:
        """Metric -> its values over images seen, including NaN and infinite values; skips cells that are no numbers."""
        path, found = self.folder / "metrics.csv", {}
        rows = read_metrics(path) if path.is_file() else {}
        for images_seen, row in sorted(rows.items()):
            for name, text in row.items():
                if name != AXIS and (value := _number(text)) is not None:
                    found.setdefault(name, []).append((images_seen, value))
        return found

    @cached_property
    def pictures(self) -> dict[str, dict[int, Path]]:
        """Name (`samples`, `reconstructions` ...) -> images seen -> PNG file, oldest first."""
        found: dict[str, dict[int, Path]] = {}
        for path in sorted((self.folder / "samples").glob("*.png")):
            if match := PICTURE.fullmatch(path.name):
                found.setdefault(match["name"], {})[int(match["images"])] = path
        return found

    @cached_property
    def images(self) -> dict[str, tuple[int, int]]:
        """Set ("train", "val") -> length and CRC-32 of its part of `data.npz`: equal for equal images.

        Empty without this file. Reads only the archive's directory. Raises `LoadError` if the archive is corrupt.
        """
        path = self.folder / "data.npz"
        if not path.is_file():
            return {}
        try:
            with zipfile.ZipFile(path) as archive:
                return {Path(entry.filename).stem: (entry.file_size, entry.CRC) for entry in archive.infolist()}
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise LoadError(f"{path}: not readable: {error}") from error

    @property
    def images_seen(self) -> int:
        """Training images up to the last row of metrics."""
        return max((curve[-1][0] for curve in self.curves.values()), default=0)


@dataclass(frozen=True)
class Evaluation:
    """A file written by `python -m ldm_lab evaluate`.

    Attributes:
        path: the file.
        content: `kind` ("samples", "images", "reconstructions"), `images_seen`, `num_samples`, `sampling`,
            `extractor`, `reference`, `versions`, and `metrics`, each with `value`, and with `low` and `high` if known.
    """

    path: Path
    content: dict[str, Any]

    @property
    def metrics(self) -> dict[str, dict[str, float]]:
        """Metric -> `value`, `low`, `high`."""
        return self.content["metrics"]


@dataclass(frozen=True)
class RunRecord:
    """The records of a run's stages.

    Attributes:
        folder: the run's folder.
        stages: name of a stage -> its record, for stages that exist.
    """

    folder: Path
    stages: dict[str, StageRecord]

    @property
    def name(self) -> str:
        """Name of the run: the name of its folder."""
        return self.folder.resolve().name

    @cached_property
    def evaluations(self) -> list[Evaluation]:
        """The evaluations in `eval/`, sorted by file name. Raises `LoadError` for an invalid file."""
        return [read_evaluation(path) for path in sorted((self.folder / EVALUATIONS).glob("*.json"))]


def read_run(folder: str | Path) -> RunRecord:
    """The record of a run from its folder, or from the folder of one of its stages.

    Raises:
        LoadError: the folder is neither.
    """
    folder = shell.path(folder)
    single = _stage(folder)
    if single:
        return RunRecord(folder, {single.stage: single})
    stages = {name: stage for name in STAGES if (stage := _stage(folder / name))}
    if not stages:
        what = (
            "no run (neither autoencoder/config.yaml nor diffusion/config.yaml)"
            if folder.is_dir()
            else "no such folder"
        )
        raise LoadError(f"{folder}: {what}; name one, such as runs/celebahq")
    return RunRecord(folder, stages)


def _stage(folder: Path) -> StageRecord | None:
    if not (folder / "config.yaml").is_file():
        return None
    stage = read_yaml(folder / "config.yaml").get("stage")
    return StageRecord(folder, stage) if stage in STAGES else None


def read_evaluation(path: Path) -> Evaluation:
    """Read one evaluation. Raises `LoadError` for an invalid file."""
    content = read_json(path)
    metrics = content.get("metrics")
    if not isinstance(metrics, dict) or not all(map(_is_value, metrics.values())):
        raise LoadError(f"{path}: is no evaluation: metrics must be name -> value; move the file away")
    return Evaluation(path, content)


def _is_value(found: object) -> bool:
    """Whether an entry is a number, perhaps with an interval; no integer that overflows a float."""
    if not isinstance(found, dict):
        return False
    numbers = [found.get("value"), *(found[end] for end in ("low", "high") if found.get(end) is not None)]
    return all(isinstance(n, float) or (isinstance(n, int) and abs(n) < 2**1023) for n in numbers)


def read_metrics(path: Path) -> dict[int, Row]:
    """Images seen -> row of a `metrics.csv`, as text without empty cells. Raises `LoadError` for any other file."""
    rows = {}
    try:
        with open(path, newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file, restval=""):
                rows[int(row[AXIS])] = {key: value for key, value in row.items() if value}
                if None in row:
                    raise UserError("a row has more entries than the first line has names")
    except (ValueError, KeyError, OSError, csv.Error) as error:
        raise LoadError(
            f"{path}: not a table with a column {AXIS}: {error}; move the file away to begin a new one"
        ) from error
    return rows


def read_picture(path: Path) -> Image.Image:
    """Read a PNG as 8-bit RGB. Raises `LoadError` for any other file, and for more than `MAX_PIXELS` pixels."""
    try:
        with Image.open(path, formats=("PNG",)) as file:
            if file.width * file.height > MAX_PIXELS:
                raise UserError(f"{file.width} x {file.height} pixels are too many")
            return file.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise LoadError(f"{path}: no picture that can be shown: {first_line(error)}") from error


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def last(curve: Curve) -> float:
    """The newest value of a curve; NaN for an empty curve."""
    return curve[-1][1] if curve else math.nan

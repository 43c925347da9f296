"""Checks of the files in a stage's folder: the first training images, and steps that were not finite."""

from __future__ import annotations

from ldm_lab.runs.diagnosis.finding import BAD, LOOK, OK, Finding, missing
from ldm_lab.runs.record import StageRecord, read_picture

SHEET = "data"  # the picture of the first training images, see `training.callbacks.health`
FEW_COLOURS = 3
MOST_COUNTED = 2**16


def sheet(record: StageRecord) -> Finding:
    """Whether the first training images are more than plain areas; the finding names their picture.

    Raises:
        LoadError: the picture cannot be read.
    """
    check, pictures = "data", record.pictures.get(SHEET)
    if not pictures:
        return missing(check, f"samples/{SHEET}_*.png", "is not there")
    path = pictures[min(pictures)]
    counted = read_picture(path).getcolors(MOST_COUNTED)
    colours = len(counted) if counted else MOST_COUNTED
    verdict = BAD if colours <= FEW_COLOURS else OK  # one is the white between the images
    count = f"{colours:,} colours" if counted else "many colours"
    advice = "The images are almost empty: look at them, and check data.root"
    return Finding(check, verdict, f"{count}; look at the network's images: {path}", f"more than {FEW_COLOURS}", advice)


def left_out(record: StageRecord) -> Finding | None:
    """Whether steps were not finite; None if all were finite."""
    files = sorted((record.folder / "not_finite").glob("*.json"))
    if not files:
        return None
    seen = max((int(file.stem) for file in files if file.stem.isdecimal()), default=0)
    stopped = seen >= record.images_seen and record.status.get("finished") is not True
    advice = "Try trainer.precision=32-true, a lower model.optimizer.lr, or trainer.gradient_clip_val=1"
    what = f"{len(files)} steps had a loss or gradient that is not finite; their images: {files[-1]}"
    return Finding("steps", BAD if stopped else LOOK, what, "none", advice)

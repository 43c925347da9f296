"""What is asked of a stage's folder, beside its numbers: the images that the network saw, steps that went wrong."""

from __future__ import annotations

from ldm_lab.runs.diagnosis.finding import BAD, LOOK, OK, Finding, missing
from ldm_lab.runs.record import StageRecord, read_picture

SHEET = "data"  # the picture of the first training images, see `training.callbacks.health`
FEW_COLOURS = 3
MOST_COUNTED = 2**16


def sheet(record: StageRecord) -> Finding:
    """Whether there is anything on the images that training began with, and where to look at them.

    Raises:
        LoadError: the picture cannot be read.
    """
    check, pictures = "data", record.pictures.get(SHEET)
    if not pictures:
        return missing(check, f"samples/{SHEET}_*.png", "is not there")
    path = pictures[min(pictures)]
    counted = read_picture(path).getcolors(MOST_COUNTED)
    colours = len(counted) if counted else MOST_COUNTED
    verdict = BAD if colours <= FEW_COLOURS else OK  # one of them is the white between the images
    count = f"{colours:,} colours" if counted else "many colours"
    advice = "There is next to nothing on the images: look at them, and at data.root"
    return Finding(check, verdict, f"{count}; look at what the network saw: {path}", f"more than {FEW_COLOURS}", advice)


def left_out(record: StageRecord) -> Finding | None:
    """Whether steps were not finite; None: none were."""
    files = sorted((record.folder / "not_finite").glob("*.json"))
    if not files:
        return None
    seen = max((int(file.stem) for file in files if file.stem.isdecimal()), default=0)
    ended = seen >= record.images_seen and record.status.get("finished") is not True
    advice = "Try trainer.precision=32-true, a lower model.optimizer.lr, or trainer.gradient_clip_val=1"
    what = f"{len(files)} of them had losses or gradients that are not finite; the images: {files[-1]}"
    return Finding("steps", BAD if ended else LOOK, what, "none", advice)

"""The places that may wait for the device in a step of training: `docs/performance.md` names them."""

import re
from pathlib import Path

from tests.rehearsal.rules import Wait

DOCS = Path(__file__).resolve().parents[2] / "docs/performance.md"
STEP = "lightning/pytorch/loops/training_epoch_loop.py: run"
VALIDATION = "lightning/pytorch/loops/evaluation_loop.py: run"
READ_LATER = "training/callbacks/not_finite.py: _settle"  # on CUDA a copy is under way


def places() -> set[str]:
    """First column of the table."""
    text = DOCS.read_text(encoding="utf-8")
    section = text.partition("## Which places wait for the device\n")[2].partition("\n## ")[0]
    return set(re.findall(r"^\| `([^`]+: \w+)` \|", section, re.MULTILINE))


def in_steps(waits: list[Wait]) -> list[Wait]:
    """Those in steps of training, without validation."""
    return [wait for wait in waits if STEP in wait.places and VALIDATION not in wait.places]


def undocumented(waits: list[Wait]) -> set[str]:
    """Those in steps of training of which no place is in the table."""
    return {str(wait) for wait in in_steps(waits) if not places() & set(wait.places)}

"""The values of `trainer.precision=`."""

from __future__ import annotations

PRECISIONS = ("auto", "32-true", "bf16-mixed", "16-mixed")  # of `trainer.precision`
SAMPLING_PRECISIONS = ("bf16-true", "16-true")  # further values for sampling: rounded weights
ALIASES = {"32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}  # Lightning's short forms

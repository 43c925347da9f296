"""Annotations of arguments and settings that say more than a type: `steps: Count`, `root: Annotated[str, Harmless]`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated


@dataclass(frozen=True)
class AtLeast:
    """`Annotated[int, AtLeast(1)]`: a number of `low` or more."""

    low: float

    def allows(self, value: float) -> bool:
        """Whether a number is in range."""
        return value >= self.low

    def __str__(self) -> str:
        return f"at least {self.low}"


@dataclass(frozen=True)
class Above(AtLeast):
    """`Annotated[float, Above(0)]`: a number of more than `low`."""

    def allows(self, value: float) -> bool:
        """Whether a number is in range."""
        return value > self.low

    def __str__(self) -> str:
        return f"above {self.low}"


@dataclass(frozen=True)
class Within(AtLeast):
    """`Annotated[float, Within(0, 1)]`: a number from `low` to `high`."""

    high: float

    def allows(self, value: float) -> bool:
        """Whether a number is in range."""
        return self.low <= value <= self.high

    def __str__(self) -> str:
        return f"from {self.low} to {self.high}"


class Given:
    """`key: Given`: any value but null."""


class Harmless:
    """`Annotated[int, Harmless]`: a run may go on with another value: data, model and objective stay the same."""


Whole = Annotated[int, AtLeast(0)]
Count = Annotated[int, AtLeast(1)]
NonNegative = Annotated[float, AtLeast(0)]
Positive = Annotated[float, Above(0)]
Probability = Annotated[float, Within(0, 1)]

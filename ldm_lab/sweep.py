"""How a recipe travels through Hydra's sweepers: pure text, so that it can be read and tested without them.

Hydra composes a config for each job of a sweep, but the stages of a recipe have different keys. The job's
own config is therefore an open dictionary `set`, and `data.root=x` travels in it as `+set.s0.data.root=x`:
the letter keeps the sigil, the number keeps apart two overrides of one node (`trainer=ddp trainer.devices=2`).
"""

from __future__ import annotations

import re

_LETTERS = {"": "s", "+": "a", "++": "f", "~": "d"}
_SIGILS = {letter: sigil for sigil, letter in _LETTERS.items()}
_PACKED = re.compile(r"^\+{0,2}set\.([safd])\d+\.(.*)$")


def pack(lines: list[str]) -> list[str]:
    """Overrides as they travel through Hydra; those of Hydra itself pass as they are."""
    packed = []
    for number, line in enumerate(lines):
        sigil, rest = re.match(r"^(\+\+|\+|~|)(.*)$", line, re.DOTALL).groups()  # type: ignore[union-attr]
        if rest.startswith(("hydra.", "hydra/")):
            packed.append(line)
        else:
            packed.append(f"+set.{_LETTERS[sigil]}{number}.{rest if '=' in rest else rest + '=null'}")
    return packed


def unpack(lines: list[str]) -> list[str]:
    """The inverse of `pack`, for the overrides of one job."""
    found = [_PACKED.match(line) for line in lines]
    return [_SIGILS[match.group(1)] + match.group(2) for match in found if match]


def job_name(base: str, swept: list[str], lines: list[str]) -> str:
    """A job's run name: a function of its swept values, so that the same command finds its runs again."""
    values = [line.lstrip("+~") for line in lines if line.lstrip("+~").split("=", 1)[0] in swept]
    return re.sub(r"[^\w.=,-]+", "_", "-".join([base, *values]))

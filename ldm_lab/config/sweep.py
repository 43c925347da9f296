"""Encodes overrides of a recipe for Hydra's sweepers, as plain text and without importing Hydra.

Hydra composes a config for each job of a sweep, but the stages of a recipe have different keys. The job's
own config is therefore an open dictionary `set`, in which `data.root=x` becomes `+set.s0.data.root=x`: the
letter encodes the sigil, and the number separates overrides of one node (`trainer=ddp trainer.devices=2`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from ldm_lab.utils.shell import word

_LETTERS = {"": "s", "+": "a", "++": "f", "~": "d"}
_SIGILS = {letter: sigil for sigil, letter in _LETTERS.items()}
_PACKED = re.compile(r"^\+{0,2}set\.([safd])\d+\.(.*)$")


def pack(lines: list[str]) -> list[str]:
    """Encode overrides for Hydra; Hydra's own overrides stay unchanged."""
    packed = []
    for number, line in enumerate(lines):
        sigil, rest = re.match(r"^(\+\+|\+|~|)(.*)$", line, re.DOTALL).groups()  # type: ignore[union-attr]
        if rest.startswith(("hydra.", "hydra/")):
            packed.append(line)
        else:
            packed.append(f"+set.{_LETTERS[sigil]}{number}.{rest if '=' in rest else rest + '=null'}")
    return packed


def unpack(lines: list[str]) -> list[str]:
    """Decode the overrides of one job: the inverse of `pack`."""
    found = [_PACKED.match(line) for line in lines]
    return [_SIGILS[match.group(1)] + match.group(2) for match in found if match]


def job_name(base: str, swept: list[str], lines: list[str]) -> str:
    """A job's run name: `base` and its swept values, so that the same command finds its runs again.

    The part after `base` needs no quotes in a shell or in Hydra: `avatars-seed-1`.
    """
    settings = [line.lstrip("+~").partition("=") for line in lines]
    return "-".join([base, *(f"{word(key)}-{word(value)}" for key, _, value in settings if key in swept)])


def search_lines(search: dict[str, Any]) -> list[str]:
    """Convert the content of a file in `configs/hparams_search/` to overrides.

    The file has the form of Hydra's sweepers: `defaults` chooses the sweeper, `hydra.sweeper` holds its settings, with
    the swept keys in `params`, and all other keys are keys of the stages.
    """
    sweeper = dict((search.get("hydra") or {}).get("sweeper") or {})
    params = sweeper.pop("params", None) or {}
    chosen = [entry for entry in search.get("defaults", []) if isinstance(entry, dict)]
    own = {key: value for key, value in search.items() if key not in ("defaults", "hydra")}
    return [
        *(f"{key.removeprefix('override ').lstrip('/')}={value}" for entry in chosen for key, value in entry.items()),
        *(f"hydra.sweeper.{line}" for line in _leaves(sweeper)),
        *_leaves(own),
        *(f"{key}={value}" for key, value in params.items()),
    ]


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Yields nested data as lines `a.b=value`."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}={'null' if value is None else value}"

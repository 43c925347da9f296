"""What people type: text that stays as it is, paths from `~` on, and commands that they can type in turn.

Hydra's grammar gives meaning to most signs and to numbers. A path or a name has none of that: behind the `=` of such a
key the rest of the line is text.
"""

from __future__ import annotations

import os
import re
import shlex
from hashlib import sha256
from pathlib import Path

from ldm_lab.utils.errors import UserError

PATHS = re.compile(
    r"autoencoder|init|ckpt|original_config|output|variation|reconstruct|paths\.\w+|(\w+\.)+(root|folder|cache_dir)"
    r"|model\.loss\.perceptual\.weights|callbacks\.\w+\.weights"
)
NAMES = re.compile(
    r"name|optimized_metric|data\.(module\.\w+\.)?background|logger\.\w+\.(project|entity|group|job_type|name|notes)"
)

_LINE = re.compile(r"(?P<start>\+{0,2}(?P<key>[\w.]+)=)(?P<value>.*)", re.DOTALL)
_QUOTED = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\""""  # as Hydra quotes
_WORD = r"(?!(?:true|false|null|inf|nan)\Z)(?:\.\.?/)*[a-z_/][\w./@-]*"
_AS_IT_IS = re.compile(rf"{_QUOTED}|null||(?i:{_WORD})", re.DOTALL | re.ASCII)
_PARTED = re.compile(rf"(?:\A|,)\s*((?:{_QUOTED})\s*(?=,|\Z)|(?:\$\{{[^}}]*\}}|[^,])*)", re.DOTALL)
LONGEST = 40  # letters of one value in a run's name
FLAGS = {"-h": "--help", "--help": "--help", "-m": "-m", "--multirun": "-m", "--cfg": "--cfg", "--cfg=job": "--cfg"}


def parted(arguments: list[str]) -> tuple[set[str], list[str]]:
    """The flags `--help`, `-m` and `--cfg` of a command line, and its settings; `--key=value` is one of these.

    Raises:
        UserError: there is no such flag.
    """
    flags, settings = set(), []
    for place, argument in enumerate(arguments):
        if argument in FLAGS:
            flags.add(FLAGS[argument])
        elif argument == "job" and arguments[place - 1 : place] == ["--cfg"]:
            continue
        elif argument.startswith("-") and ("=" not in argument or argument.startswith("--cfg=")):
            raise UserError(f"{argument}: unknown flag; there are --help, --cfg job and -m, and settings are key=value")
        else:
            settings.append(argument.removeprefix("--"))
    return flags, settings


def is_path(key: str) -> bool:
    """Whether a key of a config holds a path."""
    return PATHS.fullmatch(key) is not None


def is_text(key: str) -> bool:
    """Whether a key holds a path, a name or a word that is free."""
    return is_path(key) or NAMES.fullmatch(key) is not None


def as_text(line: str, several: bool = False) -> str:
    """An override as Hydra's grammar takes it: where its key holds text, that text is quoted if the grammar needs it.

    `null`, what was quoted for Hydra ('...' or "...") and `${...}` keep their meaning.

    Args:
        line: `key=value`.
        several: of a sweep: commas part values, as `choice(...)` does.
    """
    found = _LINE.fullmatch(line)
    if not found or not is_text(found["key"]):
        return line
    value, values = found["value"], [found["value"]]
    if several:
        value = value[len("choice(") : -1] if value.startswith("choice(") and value.endswith(")") else value
        values = [part.strip() for part in _PARTED.findall(value)]
    return found["start"] + ",".join(part if _AS_IT_IS.fullmatch(part) else quoted(part) for part in values)


def quoted(text: str) -> str:
    """Text in Hydra's quotes: `\\` counts there before a quote alone."""
    return "'" + re.sub(r"(\\*)('|\Z)", lambda found: found[1] * 2 + (found[2] and r"\'"), text) + "'"


def home(path: str) -> str:
    """A path with `~` and `~user` at its start replaced, where there is such a home."""
    return os.path.expanduser(path)


def path(path: str | Path) -> Path:
    """A path as it was typed, from `~` on or not."""
    return Path(home(str(path)))


def at_home(argument: str) -> str:
    """An argument of a tool, `~/x` or `--output=~/x`, with its `~` replaced: no shell does so in the second."""
    flag, sign, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    return flag + sign + home(value)


def word(text: str) -> str:
    """Text as a part of a file's name that neither a shell nor Hydra needs quoted; two texts never share a word."""
    safe = re.sub(r"[^\w.+-]+", "_", text, flags=re.ASCII).strip("_")[:LONGEST]
    if safe == text:
        return text
    mark = sha256(os.fsencode(text)).hexdigest()[:6]
    return f"{safe}-{mark}" if safe else mark


def command(*arguments: str) -> str:
    """What to type in a shell to run Python with these arguments."""
    return shlex.join(["python", *arguments])

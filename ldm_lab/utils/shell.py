"""Command lines: literal text for Hydra, paths with `~`, and commands to show to the user.

Hydra's grammar interprets most special characters and numbers. For a key that holds a path or a name, everything after
the `=` is literal text.
"""

from __future__ import annotations

import os
import re
import shlex
from hashlib import sha256
from pathlib import Path

from ldm_lab.utils.errors import UserError

PATHS = re.compile(
    r"autoencoder|init|ckpt|guide|original_config|output|variation|reconstruct|paths\.\w+|(\w+\.)+(root|folder|cache_dir)"
    r"|model\.loss\.perceptual\.weights|callbacks\.\w+\.weights"
)
NAMES = re.compile(
    r"name|optimized_metric|data\.(name|column|part|subset|(module\.\w+\.)?background)|logger\.\w+\.(project|entity|group|job_type|name|notes)"
)

_LINE = re.compile(r"(?P<start>\+{0,2}(?P<key>[\w.]+)=)(?P<value>.*)", re.DOTALL)
_QUOTED = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\""""  # Hydra's quoted strings
_WORD = r"(?!(?:true|false|null|inf|nan)\Z)(?:\.\.?/)*[a-z_/][\w./@-]*"
_AS_IT_IS = re.compile(rf"{_QUOTED}|null||(?i:{_WORD})", re.DOTALL | re.ASCII)
_PARTED = re.compile(rf"(?:\A|,)\s*((?:{_QUOTED})\s*(?=,|\Z)|(?:\$\{{[^}}]*\}}|[^,])*)", re.DOTALL)
LONGEST = 40  # maximum characters of one value in a run's name
FLAGS = {"-h": "--help", "--help": "--help", "-m": "-m", "--multirun": "-m", "--cfg": "--cfg", "--cfg=job": "--cfg"}


def parted(arguments: list[str]) -> tuple[set[str], list[str]]:
    """Split a command line into flags (`--help`, `-m`, `--cfg`) and settings; `--key=value` is a setting.

    Raises:
        UserError: a flag is unknown.
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
    """Whether a key holds a path, a name or other free text."""
    return is_path(key) or NAMES.fullmatch(key) is not None


def as_text(line: str, several: bool = False) -> str:
    """An override for Hydra's grammar: quotes the value of a key that holds text, if the grammar needs it.

    `null`, text already quoted for Hydra ('...' or "...") and `${...}` keep their meaning.

    Args:
        line: `key=value`.
        several: for a sweep, where commas separate values, as `choice(...)` does.
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
    """Text in Hydra's quotes, where `\\` is special only before a quote."""
    return "'" + re.sub(r"(\\*)('|\Z)", lambda found: found[1] * 2 + (found[2] and r"\'"), text) + "'"


def home(path: str) -> str:
    """Expand `~` and `~user` at the start of a path, if there is such a home folder."""
    return os.path.expanduser(path)


def path(path: str | Path) -> Path:
    """The `Path` of a typed path, with `~` expanded."""
    return Path(home(str(path)))


def at_home(argument: str) -> str:
    """Expand `~` in a tool's argument, `~/x` or `--output=~/x`; shells do not expand the second."""
    flag, sign, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    return flag + sign + home(value)


def word(text: str) -> str:
    """Encode text injectively as part of a file name that needs no quotes in a shell or in Hydra."""
    safe = re.sub(r"[^\w.+-]+", "_", text, flags=re.ASCII).strip("_")[:LONGEST]
    if safe == text:
        return text
    mark = sha256(os.fsencode(text)).hexdigest()[:6]
    return f"{safe}-{mark}" if safe else mark


def command(*arguments: str) -> str:
    """The shell command that runs Python with these arguments."""
    return shlex.join(["python", *arguments])

"""Writing files whole or not at all: what was there stays until what takes its place is on disk."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ldm_lab.errors import UserError
from ldm_lab.untrusted import first_line


class SaveError(UserError):
    """A file cannot be written; the message is one line that says which, why, and what to do."""


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write `value` to `path`, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """`with replacing(path) as temporary:` write `temporary`, which then takes the place of `path` at once.

    File and folder are flushed to disk, so that a power cut leaves the one or the other. On an exception `path` stays
    as it was, and nothing stays beside it.

    Raises:
        SaveError: the disk refused (`OSError`, wherever below the exception it lies).
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        temporary.touch(exist_ok=False)  # nothing that a foreign folder has put in this place, a link above all
        mode = temporary.stat().st_mode  # what the user's umask makes of it: safetensors' files are 0600
        yield temporary
        flush(temporary)
        temporary.chmod(mode)
        os.replace(temporary, path)
        with contextlib.suppress(OSError):  # some network disks know no such thing
            flush(path.parent)
    except Exception as error:
        if refusal := _refusal(error):
            raise SaveError(f"{path}: cannot be written: {refusal}") from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


ADVICE = {
    errno.ENOSPC: "free some space on this disk",
    errno.EDQUOT: "free some of your quota on this disk",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
}


def _refusal(error: BaseException | None) -> str | None:
    """What the disk said, and what to do; `None` where the error is another. Writers wrap it in errors of theirs."""
    while error is not None and not isinstance(error, (OSError, SafetensorError)):
        error = error.__cause__ or error.__context__
    if error is None:
        return None
    reason = getattr(error, "strerror", None) or first_line(error)
    advice = ADVICE.get(getattr(error, "errno", None), "put that right")
    return f"{reason}. What was there before is untouched: {advice}, and the same command goes on"

"""Writing files whole or not at all: what was there stays until what takes its place is on disk."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ldm_lab.utils.errors import UserError, first_line


class SaveError(UserError):
    """A file cannot be written; the message is one line that says which, why, and what to do."""


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write `value` to `path`, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """`with replacing(path) as temporary:` write `temporary`, which then takes the place of `path` at once.

    Its folder is made where there is none. File and folder are flushed to disk, so that a power cut leaves the one or
    the other. On an exception `path` stays as it was, and nothing stays beside it.

    Raises:
        SaveError: the disk refused (`OSError`, wherever below the exception it lies).
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
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
        if refusal := _refusal(error, path.parent):
            raise SaveError(f"{path}: cannot be written: {refusal}") from error
        raise
    finally:
        with contextlib.suppress(OSError):  # where nothing can be written, nothing was
            temporary.unlink(missing_ok=True)


def require_writable(folder: str | Path, key: str) -> None:
    """Find out, before any work is done, whether files can be written in a folder that may not be there yet.

    Args:
        folder: nothing is left in it.
        key: what names another place, for the message.

    Raises:
        SaveError: they cannot.
    """
    there = _nearest(Path(folder).expanduser())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        why = _place(error, there)
        raise SaveError(f"{key} must name another place: {folder} cannot be written: {why}") from error


def _nearest(folder: Path) -> Path:
    """The folder, or that above it which is there."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))


def _place(error: OSError, there: Path) -> str:
    return f"{error.strerror} ({there})" if there.is_dir() else f"{there} is no folder"


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


# What is wrong with a place, whatever is written there.
PLACES = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ELOOP, errno.ENOENT)


def _refusal(error: BaseException | None, folder: Path) -> str | None:
    """What the disk said, and what to do; `None` where the error is another. Writers wrap it in errors of theirs."""
    while error is not None and not isinstance(error, (OSError, SafetensorError)):
        error = error.__cause__ or error.__context__
    if error is None:
        return None
    if getattr(error, "errno", None) in PLACES:
        return f"{_place(error, _nearest(folder))}; choose another place"
    reason = getattr(error, "strerror", None) or first_line(error)
    advice = ADVICE.get(getattr(error, "errno", None), "put that right")
    return f"{reason}. What was there before is untouched: {advice}, and the same command goes on"

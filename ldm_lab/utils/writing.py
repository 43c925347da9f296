"""Writes files atomically: the old file stays until the new file is on disk."""

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
    """A file cannot be written; the one-line message names the file, the reason and the remedy."""


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write `value` to `path` atomically."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """`with replacing(path) as temporary:` write `temporary`, which then replaces `path` atomically.

    Creates a missing folder. Flushes file and folder to disk, so that a power cut leaves the old or the new file. On
    an exception `path` is unchanged, and the temporary file is removed.

    Raises:
        SaveError: the file cannot be written (an `OSError` anywhere in the chain of causes).
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)
        temporary.touch(exist_ok=False)  # must not exist: a foreign folder may hold a link of this name
        mode = temporary.stat().st_mode  # follows the user's umask, as safetensors writes 0600
        yield temporary
        flush(temporary)
        temporary.chmod(mode)
        os.replace(temporary, path)
        with contextlib.suppress(OSError):  # not supported on some network disks
            flush(path.parent)
    except Exception as error:
        if refusal := _refusal(error, path.parent):
            raise SaveError(f"{path}: cannot be written: {refusal}") from error
        raise
    finally:
        with contextlib.suppress(OSError):  # a folder that is not writable holds no temporary file
            temporary.unlink(missing_ok=True)


def require_writable(folder: str | Path, key: str) -> None:
    """Check before any work whether a folder, which may not exist yet, is writable.

    Args:
        folder: the folder; the check leaves no file in it.
        key: the setting that chooses another place, for the message.

    Raises:
        SaveError: the folder is not writable.
    """
    there = _nearest(Path(folder).expanduser())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        why = _place(error, there)
        raise SaveError(f"{key} must name another place: {folder} cannot be written: {why}") from error


def _nearest(folder: Path) -> Path:
    """The folder, or its nearest existing parent."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))


def _place(error: OSError, there: Path) -> str:
    return f"{error.strerror} ({there})" if there.is_dir() else f"{there} is no folder"


def flush(path: Path) -> None:
    """Wait until a file, or a folder's entries, are on disk (fsync)."""
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


# Errors of the place itself, not of a single file.
PLACES = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ELOOP, errno.ENOENT)


def _refusal(error: BaseException | None, folder: Path) -> str | None:
    """The disk's error with advice; `None` for other errors. Searches the causes, as writers wrap an `OSError`."""
    while error is not None and not isinstance(error, (OSError, SafetensorError)):
        error = error.__cause__ or error.__context__
    if error is None:
        return None
    if getattr(error, "errno", None) in PLACES:
        return f"{_place(error, _nearest(folder))}; choose another place"
    reason = getattr(error, "strerror", None) or first_line(error)
    advice = ADVICE.get(getattr(error, "errno", None), "put that right")
    return f"{reason}. What was there before is untouched: {advice}, and the same command goes on"

"""Locks: a folder that one command at a time writes into, and work that one process alone does.

The locks of folders are POSIX locks (`fcntl.lockf`), not those of `filelock` (`flock`): forked processes inherit a
`flock`, so loaders, which outlive a killed training by seconds, would keep the folder locked. A POSIX lock ends with
its process, even a killed one, and network disks share it with other machines.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import socket
import stat
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import filelock

from ldm_lab.utils.errors import UserError
from ldm_lab.utils.reading import LoadError, read_json
from ldm_lab.utils.terminal import say_once
from ldm_lab.utils.urls import masked

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

NAME = ".ldm_lab.lock"
MAX_WORDS = 300  # maximum characters of the text on a lock's holder


@contextlib.contextmanager
def if_free(path: Path) -> Iterator[bool]:
    """`with if_free(path) as mine:` true if no other process is in such a block with this file; waits for nobody."""
    lock = filelock.FileLock(path, timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


@contextlib.contextmanager
def alone(folder: Path, elsewhere: str, first: bool = True) -> Iterator[None]:
    """`with alone(folder, "another name="):` excludes other commands in such a block with this folder.

    A folder that is not writable is not locked, as a later write raises a better message. If the disk does not support
    locks, one warning names the folder.

    Args:
        folder: the folder; created if missing.
        elsewhere: the setting by which a second command can avoid the folder, for the message.
        first: whether this is the writing process of the command; other ranks take no lock.

    Raises:
        UserError: another command holds the lock; the message names it, its machine and its start time.
    """
    path = folder / NAME
    made = [at for at in (folder, *folder.parents) if not at.exists()] if first else []
    descriptor = _locked(path, elsewhere) if first else None
    try:
        yield
    finally:
        if descriptor is not None:
            path.unlink(missing_ok=True)  # still locked, so this is no other process's file
            os.close(descriptor)
            with contextlib.suppress(OSError):  # a failed command leaves no empty folders
                for at in made:
                    at.rmdir()


def _locked(path: Path, elsewhere: str) -> int | None:
    """Descriptor of the locked file, which then describes this process; `None` if locking is impossible."""
    while (descriptor := _opened(path)) is not None:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is(path, descriptor):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, json.dumps(_this_process()).encode())
                os.fsync(descriptor)  # other machines read the file while it is open here
                return descriptor
        except (BlockingIOError, PermissionError) as error:  # the system decides which one it raises
            os.close(descriptor)
            who = f"{path.parent} is in use by {_holder(path)}"
            raise UserError(f"{who}: wait for it, end it, or choose {elsewhere}") from error
        except OSError as error:
            os.close(descriptor)
            say_once(f"{path.parent} cannot be locked ({error.strerror}): see that no second command writes there")
            return None
        os.close(descriptor)  # its last holder has just removed this file
    return None


def _opened(path: Path) -> int | None:
    if fcntl is None:
        return None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError:
        return None
    if stat.S_ISREG(os.fstat(descriptor).st_mode):  # not a pipe of this name
        return descriptor
    os.close(descriptor)
    return None


def _is(path: Path, descriptor: int) -> bool:
    """Whether the path still names the open file."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _this_process() -> dict[str, Any]:
    since = datetime.now().astimezone().isoformat(" ", "seconds")
    return {
        "host": socket.gethostname(),
        "process": os.getpid(),
        "since": since,
        "command": masked(shlex.join(sys.argv)),
    }


def _holder(path: Path) -> str:
    """Text on the lock's holder, read from the lock file; only for display, as anybody may write the file."""
    try:
        found = read_json(path)
        words = "process {process} on {host} since {since} ({command})".format(**found)
    except (LoadError, LookupError, ValueError):
        return "another process"
    return "".join(character if character.isprintable() else " " for character in words[:MAX_WORDS])

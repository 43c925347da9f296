"""One process at a time writes into a folder; who comes second is told who is there.

The locks are POSIX's (`fcntl.lockf`), not those of `filelock` (`flock`): these pass to every process that is forked
meanwhile, so that loaders, which outlive a killed training by seconds, would keep it locked. A lock ends with its
process, however that ends, and network disks pass it on to other machines.
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

from ldm_lab.utils.errors import UserError
from ldm_lab.utils.reading import LoadError, read_json
from ldm_lab.utils.terminal import say_once

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

NAME = ".ldm_lab.lock"
MAX_WORDS = 300  # characters of who holds a lock


@contextlib.contextmanager
def alone(folder: Path, elsewhere: str, first: bool = True) -> Iterator[None]:
    """`with alone(folder, "another name="):` no other command is in such a block with this folder.

    Where nothing can be written nothing is locked: who then writes has the better message. A disk that knows no locks
    is named, once.

    Args:
        folder: made where there is none.
        elsewhere: what a second command may choose instead.
        first: whether this is the process of a command that writes; the others take no lock.

    Raises:
        UserError: another command is there; the message says which, on which machine and since when.
    """
    path = folder / NAME
    made = [at for at in (folder, *folder.parents) if not at.exists()] if first else []
    descriptor = _locked(path, elsewhere) if first else None
    try:
        yield
    finally:
        if descriptor is not None:
            path.unlink(missing_ok=True)  # while it is locked: nobody else's is removed
            os.close(descriptor)
            with contextlib.suppress(OSError):  # of a command that was refused nothing stays
                for at in made:
                    at.rmdir()


def _locked(path: Path, elsewhere: str) -> int | None:
    """The open file, locked and with this process's name in it; `None` where that cannot be."""
    while (descriptor := _opened(path)) is not None:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is(path, descriptor):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, json.dumps(_this_process()).encode())
                os.fsync(descriptor)  # other machines read it while it is open here
                return descriptor
        except (BlockingIOError, PermissionError) as error:  # which of them is left to the system
            os.close(descriptor)
            who = f"{path.parent} is in use by {_holder(path)}"
            raise UserError(f"{who}: wait for it, end it, or choose {elsewhere}") from error
        except OSError as error:
            os.close(descriptor)
            say_once(f"{path.parent} cannot be locked ({error.strerror}): see that no second command writes there")
            return None
        os.close(descriptor)  # of one that has just ended, and removed it
    return None


def _opened(path: Path) -> int | None:
    if fcntl is None:
        return None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError:
        return None
    if stat.S_ISREG(os.fstat(descriptor).st_mode):  # no pipe that somebody has put there
        return descriptor
    os.close(descriptor)
    return None


def _is(path: Path, descriptor: int) -> bool:
    """Whether the open file is the one that has this name now."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _this_process() -> dict[str, Any]:
    since = datetime.now().astimezone().isoformat(" ", "seconds")
    return {"host": socket.gethostname(), "process": os.getpid(), "since": since, "command": shlex.join(sys.argv)}


def _holder(path: Path) -> str:
    """Who says to have locked it, in words; a file that anybody may have written is shown and not believed."""
    try:
        found = read_json(path)
        words = "process {process} on {host} since {since} ({command})".format(**found)
    except (LoadError, LookupError, ValueError):
        return "another process"
    return "".join(character if character.isprintable() else " " for character in words[:MAX_WORDS])

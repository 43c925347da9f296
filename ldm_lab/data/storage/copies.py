"""Local copies of the objects of a store, and of the list of its files, in `<paths.cache>/stores/<key>/`.

    source.txt    the address, without login and query
    index.npz     the files of the data set, listed once
    objects/      copies of single objects: content and its CRC-32
    archives/     copies of whole archives

Every file gets its name when it is complete, so that a killed process leaves no part of a file that is ever used. A
file's name depends on the size and the tag of the object, so a copy of an older object is not used either. Any file may
be removed at any time; what is missing is fetched again.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from hashlib import blake2b
from pathlib import Path

import filelock
import numpy as np

from ldm_lab.data.dataset import digest
from ldm_lab.utils import cache_folder, shell
from ldm_lab.utils.locks import if_free
from ldm_lab.utils.terminal import say, say_once
from ldm_lab.utils.urls import URL
from ldm_lab.utils.writing import replacing

FORMAT = 1  # of the index
SOURCE = "source.txt"  # its time is that of the last use
OWN_FILE = re.compile(
    r"source\.txt|index\.(npz|lock)|objects/[0-9a-f]{2}/[0-9a-f]{30}|archives/(\.lock|[^/]+-[0-9a-f]{16}(\.[^/.]+)?)"
    r"|((objects|archives)/)?\.[^/]+\.\d+\.tmp"
)
OLD = 86400  # seconds after which a temporary file belongs to no living process
CHECK = struct.Struct("<I")

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Copies:
    """The copies of one data set's objects.

    Args:
        folder: `<paths.cache>/stores/<key>`.
        limit: maximum bytes of the copies; None: no limit.
    """

    folder: Path
    limit: int | None = None

    @classmethod
    def of(cls, root: URL, cache_dir: str | Path, limit: int | None) -> Copies:
        """The copies of the data set at a URL; logins and signatures in the URL do not matter."""
        return cls(cache_folder.local(cache_dir) / "stores" / digest([root.identity]), limit)

    def index(self, source: URL, count: str, make: Callable[[], Arrays]) -> Arrays:
        """The kept list of the files; `make` lists them if there is none. Other processes wait for the first.

        Args:
            source: address of the data set.
            count: name of the array whose length is the number of files.
            make: makes plain arrays.
        """
        path = self.folder / "index.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(path.with_suffix(".lock")):
            if (found := _load(path)) is not None:
                when = datetime.fromtimestamp(path.stat().st_mtime).isoformat(" ", "minutes")
                listed = f"data.root={source}: {len(found[count]):,} files by the list of {when}"
                _tell(f"{listed}; to list them anew, remove {path}")
                with contextlib.suppress(OSError):  # the cache may belong to another user
                    os.utime(self.folder / SOURCE)
                return found
            self.sweep()
            found = make()
            with replacing(self.folder / SOURCE) as temporary:
                temporary.write_text(f"{source.identity}\n", encoding="utf-8")
            with replacing(path) as temporary, open(temporary, "wb") as file:
                np.savez(file, format=np.array(FORMAT), **found)
            return found

    def object(self, name: str, size: int, tag: int) -> Path:
        """Path of the copy of a single object."""
        key = blake2b(f"{size} {tag} {name}".encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
        return self.folder / "objects" / key[:2] / key[2:]

    def archive(self, name: str, size: int, tag: str) -> Path:
        """Path of the copy of an archive."""
        stem, dot, ending = name.rpartition(".")
        return self.folder / "archives" / f"{shell.word(stem)}-{digest([name, size, tag])}{dot}{ending}"

    def load(self, path: Path, size: int) -> bytes | None:
        """Content of a copy; `None` if there is none, or a power cut has damaged it."""
        try:
            content = path.read_bytes()
        except OSError:
            return None
        body, check = content[: -CHECK.size], content[-CHECK.size :]
        return body if len(body) == size and check == CHECK.pack(zlib.crc32(body)) else None

    def keep(self, path: Path, content: bytes) -> None:
        """Write a copy; a full disk costs the copy, not the run."""
        # Not `replacing`: a flush for each of a million images would cost more than fetching one that a power cut hits.
        temporary = path.parent.parent / f".{path.name}.{os.getpid()}.tmp"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(content + CHECK.pack(zlib.crc32(content)))
            os.replace(temporary, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            say_once(full(self.folder, error))

    def sweep(self) -> None:
        """Remove temporary files of killed processes."""
        for kind in ("objects", "archives"):
            for path in (self.folder / kind).glob(".*.tmp"):
                with contextlib.suppress(OSError):
                    if time.time() - path.stat().st_mtime > OLD:
                        path.unlink()

    @contextlib.contextmanager
    def fetching(self) -> Iterator[bool]:
        """`with copies.fetching() as mine:` true if no other process is fetching an archive of this data set."""
        folder = self.folder / "archives"
        folder.mkdir(parents=True, exist_ok=True)
        with if_free(folder / ".lock") as mine:
            yield mine

    def make_room(self, size: int) -> None:
        """Remove the archives that were fetched first until `size` bytes more are within the limit."""
        if self.limit is None:
            return
        there = sorted((path.stat().st_mtime, path) for path in (self.folder / "archives").glob("[!.]*"))
        total = sum(path.stat().st_size for _, path in there) + size
        for _, path in there:
            if total <= self.limit:
                return
            total -= path.stat().st_size
            path.unlink(missing_ok=True)

    def fitting(self, sizes: np.ndarray) -> np.ndarray:
        """Which objects of these sizes to keep: the first that fit into the limit, the same for every process.

        Nothing is ever evicted for another: an epoch shows each image once, in another order than the epoch before, so
        a fixed part of the images is found here in each epoch; of the images used last, almost none would be.
        """
        return np.cumsum(sizes) <= (np.inf if self.limit is None else self.limit)


def full(folder: Path, error: OSError) -> str:
    """A line for the user on a copy that cannot be written."""
    advice = (
        "free some space, or set paths.cache_limit=" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "see to it"
    )
    return f"paths.cache: no more copies in {folder}: {error.strerror}: images come from the store each time; {advice}"


def _load(path: Path) -> Arrays | None:
    """The arrays of an index; `None` without one that this version can read."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        return arrays if arrays.pop("format") == FORMAT else None
    except Exception:  # numpy raises almost anything on corrupt files
        return None


_told: set[str] = set()


def _tell(line: str) -> None:
    if line not in _told:
        _told.add(line)
        say(line)


def pack(names: list[bytes]) -> Arrays:
    """Names as two arrays of plain bytes; one long name costs no memory for the others."""
    ends = np.cumsum([len(name) for name in names], dtype=np.int64)
    return {"ends": ends, "letters": np.frombuffer(b"".join(names), np.uint8)}


def unpack(arrays: Arrays) -> list[bytes]:
    """The names of `pack`."""
    letters, ends = arrays["letters"].tobytes(), arrays["ends"].tolist()
    return [letters[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)] if ends else []

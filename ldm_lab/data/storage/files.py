"""The files below one root, as data sets read them; the files of a folder."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ldm_lab.utils.errors import UserError

Place = tuple[int, ...]  # location of a file for its `Files`, as numbers, so that one array holds all files


class Found(NamedTuple):
    """The files with some extensions below a root, sorted.

    Attributes:
        names: `(N,)`, bytes (see `os.fsencode`).
        places: `(N, k)`, int64.
        others: extension -> number of the other files; "" for files without an extension.
    """

    names: np.ndarray
    places: np.ndarray
    others: Counter[str]

    def at(self, index: int) -> tuple[str, Place]:
        """Name and place of a file."""
        return os.fsdecode(self.names[index]), tuple(self.places[index].tolist())


@dataclass(frozen=True)
class Files:
    """The files below one root, read by name and place.

    It holds a path and no open file, so it can be pickled and shared by forked or spawned processes.
    """

    root: Path

    def members(self) -> Iterable[tuple[str, Place]]:
        """Name (POSIX, relative to the root) and place of every file that is not hidden, in any order."""
        raise NotImplementedError

    def find(self, suffixes: tuple[str, ...]) -> Found:
        """The files with one of `suffixes`, in upper or lower case. Raises `UserError` as `members`."""
        return sort_members(self.members(), suffixes)

    def ahead(self, wanted: list[tuple[str, Place]], stream: bool) -> None:
        """Hear which files (name, place) are read next.

        Args:
            wanted: the files.
            stream: whether archives are read one after another, so that all of this archive is wanted.
        """

    def read(self, name: str, place: Place) -> bytes:
        """Content of a file. Raises `OSError`, `ValueError` or `zlib.error` if it cannot be read."""
        raise NotImplementedError

    def size(self, name: str, place: Place) -> int:
        """Size of a file in bytes."""
        raise NotImplementedError

    def identity(self, name: str, place: Place) -> bytes:
        """Text that changes with a file: its size and name."""
        return b"%d %b" % (self.size(name, place), os.fsencode(name))

    def modified(self, name: str, place: Place) -> int:
        """A number that changes with the content where its size may not; 0 where none is known."""
        return 0


class Folder(Files):
    """A folder with all subfolders; follows links."""

    def members(self) -> Iterator[tuple[str, Place]]:
        """Every file below the folder."""
        seen = set()  # folders, by device and inode, as links may form cycles
        pending = [""]
        while pending:
            folder = pending.pop()
            path = os.path.join(self.root, folder)  # pathlib would double the total time
            try:
                status = os.stat(path)
                if (status.st_dev, status.st_ino) in seen:
                    continue
                seen.add((status.st_dev, status.st_ino))
                with os.scandir(path) as entries:
                    for entry in entries:
                        if is_hidden(entry.name):
                            continue
                        if entry.is_symlink() and not os.path.exists(entry.path):
                            yield f"{folder}{entry.name}", ()  # a broken link counts as a corrupt file
                        elif entry.is_dir():
                            pending.append(f"{folder}{entry.name}/")
                        elif entry.is_file():
                            yield f"{folder}{entry.name}", ()
            except OSError as error:
                raise UserError(f"data.root: the folder {path} cannot be listed: {error.strerror}") from error

    def read(self, name: str, place: Place) -> bytes:
        """Read the file."""
        return (self.root / name).read_bytes()

    def size(self, name: str, place: Place) -> int:
        """Size from the file system; -1 for a broken link or a file that is gone."""
        try:
            return (self.root / name).stat().st_size
        except OSError:
            return -1

    def modified(self, name: str, place: Place) -> int:
        """Time of the last change; -1 for a broken link or a file that is gone."""
        try:
            return (self.root / name).stat().st_mtime_ns
        except OSError:
            return -1


def is_hidden(name: str) -> bool:
    """Whether to skip a file or folder: `.name` (also `..`), and the files that macOS adds to archives."""
    return (name.startswith(".") and name != ".") or name == "__MACOSX"


def sort_members(members: Iterable[tuple[str, Place]], suffixes: tuple[str, ...]) -> Found:
    """The members with one of `suffixes`, sorted by name."""
    # Of two members of the same name the last one counts, as in unpacking.
    places, others = {}, Counter()
    for name, place in members:
        if name.lower().endswith(suffixes):
            places[os.fsencode(name)] = place
        else:
            others[os.path.splitext(name)[1].lower()] += 1
    names = sorted(places)
    # Arrays, as every worker would copy millions of Python objects, page by page.
    return Found(np.array(names, np.bytes_), np.array([places[name] for name in names], np.int64), others)

"""Reads the files of a folder, a zip archive or a tar archive; never extracts an archive to disk."""

from __future__ import annotations

import functools
import os
import stat
import struct
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np

from ldm_lab.utils import shell
from ldm_lab.utils.errors import UserError
from ldm_lab.utils.reading import kind_of
from ldm_lab.utils.stores import StoreError

ARCHIVES = (".zip", ".tar")
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstandard"}
AGAIN = "pack it again as a plain .tar or .zip"
AHEAD = 2**20  # bytes read at once while an archive is listed
LARGEST = 2**30  # maximum bytes of an unpacked archive member

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


class Archive(Files):
    """An archive file. Each read opens it anew, as processes would share the position of an open file."""

    kind: ClassVar[str]

    def entries(self) -> Iterator[tuple[str, Place]]:
        """Name and place of every file in the archive, as stored."""
        raise NotImplementedError

    def shown(self) -> list[tuple[str, Place]]:
        """The entries that are not hidden."""
        try:
            return [entry for entry in self.entries() if not any(map(is_hidden, entry[0].split("/")))]
        except StoreError:
            raise
        except Exception as error:  # archive readers raise almost anything on corrupt files
            raise UserError(f"data.root={self.root}: this {self.kind} archive cannot be read: {error}") from error

    def members(self) -> list[tuple[str, Place]]:
        """Every file, relative to the common top folder, if there is one."""
        return without_top(self.shown())

    def find(self, suffixes: tuple[str, ...]) -> Found:
        """See `Files.find`; both splits share one listing."""
        return _find_once(self, suffixes, self.root.stat().st_mtime_ns)


class ZipArchive(Archive):
    """A zip archive with stored or deflated members. Place: offset, packed size, size, method, CRC."""

    kind = "zip"

    def entries(self) -> Iterator[tuple[str, Place]]:
        """Every file of the central directory, without links."""
        with self.root.open("rb", AHEAD) as file, zipfile.ZipFile(file) as archive:
            for entry in archive.infolist():
                if entry.is_dir() or stat.S_ISLNK(entry.external_attr >> 16):
                    continue
                if entry.flag_bits & 1:
                    raise UserError(f"{entry.filename} is encrypted; {AGAIN}")
                if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise UserError(f"{entry.filename} is compressed by method {entry.compress_type}; {AGAIN}")
                sizes = entry.compress_size, entry.file_size
                yield entry.filename, (entry.header_offset, *sizes, entry.compress_type, entry.CRC)

    def read(self, name: str, place: Place) -> bytes:
        """Unpack one member and check its CRC."""
        offset, packed, size, method, checksum = place
        _check_size(max(packed, size))
        with self.root.open("rb") as file:
            file.seek(offset)
            signature, lengths = struct.unpack("<4s22x4s", file.read(30).ljust(30))
            file.seek(sum(struct.unpack("<HH", lengths)), os.SEEK_CUR)  # skip its name and extra field
            content = file.read(packed)
        if method == zipfile.ZIP_DEFLATED:
            content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, size + 1)
        if signature != b"PK\3\4" or len(content) != size or zlib.crc32(content) != checksum:
            raise UserError("damaged in the archive")
        return content

    def size(self, name: str, place: Place) -> int:
        """Size from the central directory."""
        return place[2]


class TarArchive(Archive):
    """An uncompressed tar archive. Place: offset, size."""

    kind = "tar"

    def entries(self) -> Iterator[tuple[str, Place]]:
        """Every regular file, without links and devices."""
        with self.root.open("rb", AHEAD) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            while (entry := archive.next()) is not None:
                archive.members.clear()  # else tarfile keeps all entries in memory
                if entry.issparse():
                    raise UserError(f"{entry.name} is stored with holes (tar --sparse); {AGAIN}")
                if entry.isreg():
                    yield entry.name, (entry.offset_data, entry.size)
            archive.fileobj.seek(archive.offset)
            if archive.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):  # else tarfile stops silently at a corrupt entry
                raise tarfile.ReadError(f"no entry at byte {archive.offset:,}")

    def read(self, name: str, place: Place) -> bytes:
        """Read one member."""
        offset, size = place
        _check_size(size)
        with self.root.open("rb") as file:
            file.seek(offset)
            content = file.read(size)
        if len(content) != size:
            raise UserError("cut short in the archive")
        return content

    def size(self, name: str, place: Place) -> int:
        """Size from the member's header."""
        return place[1]


def open_root(root: str | Path | None) -> Files:
    """The files of `data.root`. Raises `UserError` unless it is a folder or a readable archive."""
    if root is None or str(root) in ("", "???"):
        raise UserError("data.root is not set: name the folder of images, data.root=<folder>, or a zip or tar archive")
    path = shell.path(root)
    if path.is_dir():
        return Folder(path)
    if not path.exists():
        raise UserError(f"data.root={root}: no such folder or archive; expected a folder of images")
    try:
        return open_archive(path)
    except OSError as error:
        raise UserError(f"data.root={root}: cannot be read: {error.strerror}") from error


def open_archive(path: Path) -> Archive:
    """The archive at a path. Raises `UserError` unless it is a readable archive, `OSError` if it cannot be read."""
    with open(path, "rb") as file:
        start = file.read(64)
    for magic, name in COMPRESSED.items():
        if start.startswith(magic):
            raise UserError(
                f"data.root={path}: compressed with {name}, so that no image can be read without all before it; "
                f"unpack it, or {AGAIN}"
            )
    # Test tar first: zip files are recognised by their ends, so a tar that ends with a zip file may look like one.
    if tarfile.is_tarfile(path):
        return TarArchive(path)
    if zipfile.is_zipfile(path):
        return ZipArchive(path)
    kind = f" ({kind})" if (kind := kind_of(start)) else ""
    raise UserError(
        f"data.root={path}: this is a file, and not a whole zip or tar archive{kind}; expected a folder of images"
    )


def without_top(entries: list[tuple[str, Place]]) -> list[tuple[str, Place]]:
    """Names of entries, relative to the common top folder, if there is one.

    A folder `photos` may be packed as `photos/a.png`, `./a.png` or `a.png`.
    """
    tops = {name[: name.find("/") + 1] for name, _ in entries}
    top = tops.pop() if len(tops) == 1 else ""
    return [(name[len(top) :], place) for name, place in entries]


def is_hidden(name: str) -> bool:
    """Whether to skip a file or folder: `.name` (also `..`), and the files that macOS adds to archives."""
    return (name.startswith(".") and name != ".") or name == "__MACOSX"


@functools.lru_cache(maxsize=1)
def _find_once(archive: Archive, suffixes: tuple[str, ...], changed: int) -> Found:
    return sort_members(archive.members(), suffixes)


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


def _check_size(size: int) -> None:
    if size > LARGEST:
        raise UserError(f"{size:,} bytes, more than the {LARGEST:,} that an image may have")

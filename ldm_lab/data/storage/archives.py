"""Reads the files of a zip or tar archive; never extracts an archive to disk."""

from __future__ import annotations

import functools
import os
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from ldm_lab.data.storage.files import Files, Folder, Found, Place, is_hidden, sort_members
from ldm_lab.data.storage.stack import open_stack
from ldm_lab.utils import shell
from ldm_lab.utils.errors import UserError
from ldm_lab.utils.reading import kind_of
from ldm_lab.utils.stores import StoreError

ARCHIVES = (".zip", ".tar")
STACKS = (".npy", ".npz")  # one array of all images
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstandard"}
AGAIN = "pack it again as a plain .tar or .zip"
AHEAD = 2**20  # bytes read at once while an archive is listed
LARGEST = 2**30  # maximum bytes of an unpacked archive member


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
        return _find_once(self, suffixes, self.modified("", ()))

    def modified(self, name: str, place: Place) -> int:
        """Time of the archive's last change."""
        return self.root.stat().st_mtime_ns


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
    """The files of `data.root`. Raises `UserError` unless it is a folder, a readable archive or a stack."""
    if root is None or str(root) in ("", "???"):
        raise UserError("data.root is not set: name the folder of images, data.root=<folder>, or a zip or tar archive")
    path = shell.path(root)
    if path.is_dir():
        return Folder(path)
    if not path.exists():
        raise UserError(f"data.root={root}: no such folder or archive; expected a folder of images")
    if path.suffix in STACKS:
        return open_stack(path)
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


@functools.lru_cache(maxsize=2)  # pictures, and arrays
def _find_once(archive: Archive, suffixes: tuple[str, ...], changed: int) -> Found:
    return sort_members(archive.members(), suffixes)


def _check_size(size: int) -> None:
    if size > LARGEST:
        raise UserError(f"{size:,} bytes, more than the {LARGEST:,} that an image may have")

"""Sets of archives, `data.root=shards-{000..099}.tar`, here or in a store.

A single archive in a store is a set of one.
"""

from __future__ import annotations

import functools
import os
import re
import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ldm_lab.data.storage.archives import (
    AGAIN,
    ARCHIVES,
    STACKS,
    Archive,
    TarArchive,
    ZipArchive,
    open_archive,
    open_root,
    without_top,
)
from ldm_lab.data.storage.copies import Arrays, Copies, pack, unpack
from ldm_lab.data.storage.files import Files, Found, Place, sort_members
from ldm_lab.data.storage.remote import KEY, RemoteFile, RemoteFolder
from ldm_lab.utils import shell
from ldm_lab.utils.errors import UserError
from ldm_lab.utils.lengths import parse_bytes
from ldm_lab.utils.stores import Object, Store
from ldm_lab.utils.terminal import say_once
from ldm_lab.utils.urls import URL, is_url, masked
from ldm_lab.utils.writing import SaveError

BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
PACKED = (".gz", ".tgz", ".xz", ".bz2", ".zst", ".7z", ".rar")
MOST = 100_000  # maximum number of shards


@dataclass(frozen=True)
class Shards(Files):
    """The files of several archives as one data set. Place: number of the archive, place in the archive.

    Args:
        root: the pattern, for messages.
    """

    @property
    def archives(self) -> tuple[Archive, ...]:
        """The archives, in the pattern's order."""
        return _local(str(self.root))

    def members(self) -> list[tuple[str, Place]]:
        """Every file, relative to the common top folder of all archives. Raises `UserError` if two have one name."""
        return joined(self.archives)

    def find(self, suffixes: tuple[str, ...]) -> Found:
        """See `Files.find`; both splits share one listing."""
        return _find_once(self, suffixes)

    def read(self, name: str, place: Place) -> bytes:
        """Read one member."""
        return self.archives[place[0]].read(name, place[1:])

    def size(self, name: str, place: Place) -> int:
        """Size by the archive's directory."""
        return self.archives[place[0]].size(name, place[1:])

    def require_room(self, window: int) -> None:
        """Raise `UserError` if the limit of copies is too low to read `window` archives at a time."""

    def modified(self, name: str, place: Place) -> int:
        """Time of the last change of the member's archive."""
        return self.archives[place[0]].modified(name, place[1:])


@dataclass(frozen=True)
class RemoteShards(Shards):
    """Archives in a store.

    The archives that fit into the limit are copied as a whole; a member of any other is one request. Where archives are
    read one after another (`stream`), those of the current window are copied, and replace those that were copied first.

    Args:
        root: the pattern.
        copies: the copies of the archives.
    """

    root: URL
    copies: Copies

    @property
    def archives(self) -> tuple[Archive, ...]:
        """The archives."""
        return _indexed(self)[0]

    def members(self) -> Iterator[tuple[str, Place]]:
        """Every file; listed once, see `Copies.index`."""
        arrays = _indexed(self)[1]
        places = map(tuple, arrays["places"].tolist())
        return zip(map(os.fsdecode, unpack(arrays)), places, strict=True)

    def ahead(self, wanted: list[tuple[str, Place]], stream: bool) -> None:
        """Copy an archive in the background if it is to be kept or is in the current window."""
        archives, arrays = _indexed(self)
        kept = self.copies.fitting(arrays["shard_sizes"])
        for number in dict.fromkeys(place[0] for _, place in wanted):
            file = archives[number].root
            if (stream or kept[number]) and not file.copy.exists():
                _begin_to_copy(file, self.copies)

    def require_room(self, window: int) -> None:
        """Raise `UserError` if the limit of copies does not hold the window and the archive that comes next."""
        needed = int(np.sort(_indexed(self)[1]["shard_sizes"])[-window - 1 :].sum())
        if self.copies.limit is not None and needed > self.copies.limit:
            raise UserError(
                f"paths.cache_limit={self.copies.limit}: data.shard_window={window} may need {needed:,} bytes, of the"
                " largest archives in the window and the next one: raise the limit, or lower the window"
            )

    def modified(self, name: str, place: Place) -> int:
        """Hash of the tag of the member's archive."""
        return zlib.crc32(self.archives[place[0]].root.listed.tag.encode())

    def file(self, url: URL, listed: Object) -> RemoteFile:
        """One archive's file."""
        return RemoteFile(url, self.copies.archive(url.name, listed.size, listed.tag), listed)

    def list_all(self) -> Arrays:
        """List the archives; those that fit into the limit are copied first."""
        urls = [URL(text) for text in expanded(self.root.text)]
        listed = [Store(url, KEY).find() for url in urls]
        kept = self.copies.fitting(np.array([entry.size for entry in listed]))
        files = [self.file(url, entry) for url, entry in zip(urls, listed, strict=True)]
        for number, file in enumerate(files):
            if kept[number] and not file.copy.exists():
                try:
                    file.fetch()
                except SaveError as error:
                    raise SaveError(f"{error}; or set paths.cache_limit= below the free space") from error
        members = joined([_kind(file.url)(file) for file in files])
        return {
            **pack([os.fsencode(name) for name, _ in members]),
            "places": np.array([place for _, place in members], np.int64),
            "shard_sizes": np.array([entry.size for entry in listed], np.int64),
            "shard_tags": np.array([entry.tag for entry in listed], np.str_),
        }


def open_files(root: str | Path | None, cache_dir: str | Path | None, cache_limit: str | int | None) -> Files:
    """The files of `data.root`: a folder, an archive or a set of archives, here or in a store.

    Args:
        root: a path or a URL.
        cache_dir: `paths.cache`, for copies of what a store holds.
        cache_limit: `paths.cache_limit`.

    Raises:
        UserError: the root cannot be read, by its form or, if it is local, by its content.
    """
    limit = parse_bytes(cache_limit, "paths.cache_limit")
    if is_url(root):
        url = URL(str(root))
        if cache_dir is None:
            raise UserError(f"{KEY}={url}: needs a local folder for its copies, paths.cache= (cache_dir=null)")
        if url.name.lower().endswith(PACKED):
            raise UserError(f"{KEY}={url}: compressed, so that no image can be read without all before it; {AGAIN}")
        if url.scheme.startswith("http") and not url.name.lower().endswith(ARCHIVES):
            raise UserError(f"{KEY}={url}: a web server lists no files: name a .zip or .tar file, or a set of them")
        if url.name.lower().endswith(STACKS):
            raise UserError(f"{KEY}={url}: one array is read by memory map: copy it to a local folder")
        kind = RemoteShards if url.name.lower().endswith(ARCHIVES) else RemoteFolder
        return kind(url, Copies.of(url, cache_dir, limit))
    if root is not None and BRACES.search(str(root)) and not shell.path(root).exists():
        _local(str(root))  # raises if an archive is missing
        return Shards(Path(root))
    return open_root(root)


def expanded(pattern: str) -> list[str]:
    """`a-{08..10}.tar` -> `a-08.tar`, `a-09.tar`, `a-10.tar`; several pairs of braces count like digits.

    Raises:
        UserError: a range is empty, or the set is too large.
    """
    found = BRACES.search(pattern)
    if not found:
        return [pattern]
    first, last = map(int, found.groups())
    if not first <= last <= first + MOST:
        raise UserError(f"{KEY}={masked(pattern)}: {found[0]} must count upwards, to at most {MOST:,} archives")
    width = len(found[1]) if found[1].startswith("0") or len(found[1]) == len(found[2]) else 0
    rest = expanded(pattern[found.end() :])
    return [f"{pattern[: found.start()]}{n:0{width}}{end}" for n in range(first, last + 1) for end in rest]


def joined(archives: tuple[Archive, ...] | list[Archive]) -> list[tuple[str, Place]]:
    """The members of several archives, without their common top folder."""
    entries, owners = [], {}
    for number, archive in enumerate(archives):
        for name, place in archive.shown():
            if owners.setdefault(name, number) != number:
                both = f"{archives[owners[name]].root} and {archive.root}"
                raise UserError(f"{KEY}: {name} is in {both}: the names in a set of archives must differ")
            entries.append((name, (number, *place)))
    return without_top(entries)


def _kind(url: URL) -> type[Archive]:
    return ZipArchive if url.name.lower().endswith(".zip") else TarArchive


@functools.lru_cache(maxsize=2)
def _local(pattern: str) -> tuple[Archive, ...]:
    paths = [shell.path(text) for text in expanded(pattern)]
    if missing := [path for path in paths if not path.is_file()]:
        raise UserError(f"{KEY}={pattern}: {len(missing)} of {len(paths)} archives are missing, such as {missing[0]}")
    try:
        return tuple(map(open_archive, paths))
    except OSError as error:
        raise UserError(f"{KEY}={pattern}: cannot be read: {error.strerror}") from error


@functools.lru_cache(maxsize=2)
def _indexed(shards: RemoteShards) -> tuple[tuple[Archive, ...], Arrays]:
    arrays = shards.copies.index(shards.root, "ends", shards.list_all)
    urls = map(URL, expanded(shards.root.text))
    facts = zip(arrays["shard_sizes"].tolist(), arrays["shard_tags"].tolist(), strict=True)
    files = (shards.file(url, Object("", *fact)) for url, fact in zip(urls, facts, strict=True))
    return tuple(_kind(file.url)(file) for file in files), arrays


@functools.lru_cache(maxsize=1)
def _find_once(shards: Shards, suffixes: tuple[str, ...]) -> Found:
    return sort_members(shards.members(), suffixes)


def _begin_to_copy(file: RemoteFile, copies: Copies) -> None:
    """Copy an archive in the background, unless this process or another is copying; until then ranges are read."""
    busy = _busy(os.getpid())
    if busy.acquire(blocking=False):
        threading.Thread(target=_copy, args=(file, copies, busy), daemon=True).start()


def _copy(file: RemoteFile, copies: Copies, busy: threading.Lock) -> None:
    try:
        with copies.fetching() as mine:
            if mine and not file.copy.exists():
                copies.make_room(file.listed.size)
                file.fetch()
    except UserError as error:
        say_once(str(error))
    finally:
        busy.release()


@functools.lru_cache(maxsize=1)
def _busy(process: int) -> threading.Lock:
    return threading.Lock()

"""Images of a store, each an object of its own below a prefix: `data.root=s3://bucket/photos`."""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b, md5
from pathlib import Path
from typing import Any

import numpy as np

from ldm_lab.data.storage.copies import Arrays, Copies, pack, unpack
from ldm_lab.data.storage.files import Files, Found, Place, is_hidden, sort_members
from ldm_lab.utils.stores import Object, Store, StoreError
from ldm_lab.utils.urls import URL

KEY = "data.root"
AT_ONCE = 16  # objects that a process fetches at the same time
KEPT, IS_MD5 = 1, 2  # bits of a place's last number


@dataclass(frozen=True)
class RemoteFolder(Files):
    """The objects below a URL, as the files of a folder. Place: size, hash of the tag, flags.

    Copies of the objects that fit into the limit are kept (see `Copies`); the others are read from the store each time.

    Args:
        root: the URL.
        copies: the copies of its objects.
    """

    root: URL
    copies: Copies

    @property
    def store(self) -> Store:
        """The objects."""
        return Store(self.root, KEY)

    def members(self) -> Iterator[tuple[str, Place]]:
        """Every object with no hidden part in its name; listed once, see `Copies.index`."""
        arrays = self.copies.index(self.root, "sizes", self._list)
        flags = arrays["is_md5"] * IS_MD5 + self.copies.fitting(arrays["sizes"]) * KEPT
        places = zip(arrays["sizes"].tolist(), arrays["tags"].tolist(), flags.tolist(), strict=True)
        for name, place in zip(unpack(arrays), places, strict=True):
            yield os.fsdecode(name), place

    def _list(self) -> Arrays:
        names, sizes, tags, is_md5 = [], [], [], []
        for entry in self.store.objects():
            if not any(map(is_hidden, entry.name.split("/"))):
                names.append(os.fsencode(entry.name))
                sizes.append(entry.size)
                tags.append(_hash(entry.tag))
                is_md5.append(_is_md5(entry.tag))
        order = np.array(sorted(range(len(names)), key=names.__getitem__), np.int64)
        arrays = {
            "sizes": np.array(sizes, np.int64),
            "tags": np.array(tags, np.int64),
            "is_md5": np.array(is_md5, bool),
        }
        return {**pack([names[n] for n in order]), **{name: array[order] for name, array in arrays.items()}}

    def find(self, suffixes: tuple[str, ...]) -> Found:
        """See `Files.find`; both splits share one listing."""
        return _find_once(self, suffixes)

    def ahead(self, wanted: list[tuple[str, Place]], stream: bool) -> None:
        """Begin to fetch objects that are about to be read."""
        coming = _coming(os.getpid())
        for name, place in wanted:
            if (self, name) not in coming and not (place[2] & KEPT and self._path(name, place).exists()):
                coming[self, name] = _pool(os.getpid()).submit(self._fetch, name, place)

    def read(self, name: str, place: Place) -> bytes:
        """Content of an object, from its copy or from the store.

        Raises:
            StoreError: the object is gone, has changed since it was listed, or the store cannot be read.
        """
        if coming := _coming(os.getpid()).pop((self, name), None):
            return coming.result()
        if place[2] & KEPT and (content := self.copies.load(self._path(name, place), place[0])) is not None:
            return content
        return self._fetch(name, place)

    def _fetch(self, name: str, place: Place) -> bytes:
        size, tag, flags = place
        try:
            content = self.store.read(name, 0, size)
        except StoreError:
            self._check(name, place)
            raise
        if flags & IS_MD5 and _hash(md5(content, usedforsecurity=False).hexdigest()) != tag:
            self._check(name, place)  # tags of objects that the store encrypts are no MD5
        if flags & KEPT:
            self.copies.keep(self._path(name, place), content)
        return content

    def _check(self, name: str, place: Place) -> None:
        """Raise `StoreError` if the object is not the listed one."""
        now = self.store.find(name)
        if (now.size, _hash(now.tag)) != place[:2]:
            raise StoreError(
                f"{KEY}={self.root / name}: changed since it was listed; to list all anew, remove"
                f" {self.copies.folder / 'index.npz'}"
            )

    def _path(self, name: str, place: Place) -> Path:
        return self.copies.object(name, place[0], place[1])

    def size(self, name: str, place: Place) -> int:
        """Size by the list."""
        return place[0]

    def modified(self, name: str, place: Place) -> int:
        """Hash of the object's tag."""
        return place[1]


@dataclass(frozen=True)
class RemoteFile:
    """One object of a store, opened like a `Path`: its copy if there is one, else the store, range by range.

    Args:
        url: the object's address.
        copy: path of the copy, which may not exist.
        listed: the object as it was listed.
    """

    url: URL
    copy: Path
    listed: Object

    def __str__(self) -> str:
        return str(self.url)

    @property
    def store(self) -> Store:
        """The object as a store of one."""
        return Store(self.url, KEY)

    def open(self, mode: str = "rb", buffering: int = -1) -> Any:  # noqa: ANN401
        """The file, for reading."""
        if self.listed.size < 0 and not self.copy.exists():  # such a web server sends no ranges
            self.fetch()
        try:
            return self.copy.open(mode, buffering)
        except FileNotFoundError:
            _require_same(self)
            ranges = Ranges(self)
            return io.BufferedReader(ranges, buffering) if buffering > 1 else ranges

    def fetch(self) -> None:
        """Make the copy. Raises `StoreError` or `SaveError`."""
        require_same(self)
        self.store.download("", self.copy, self.listed.size)


class Ranges(io.RawIOBase):
    """An object of a store as a file; each read is one request."""

    def __init__(self, file: RemoteFile) -> None:
        super().__init__()
        self.file, self.place = file, 0

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Set the position of the next read."""
        self.place = offset + (0, self.place, self.file.listed.size)[whence]
        return self.place

    def tell(self) -> int:
        """Position of the next read."""
        return self.place

    def readinto(self, buffer: Any) -> int:  # noqa: ANN401
        """Read as many bytes as the buffer holds, or up to the end."""
        stop = min(self.place + len(buffer), self.file.listed.size)
        content = self.file.store.read("", self.place, stop)
        buffer[: len(content)] = content
        self.place += len(content)
        return len(content)


def require_same(file: RemoteFile) -> None:
    """Raise `StoreError` if an object is not the listed one."""
    now = file.store.find()
    if (now.size, now.tag) != (file.listed.size, file.listed.tag):
        raise StoreError(
            f"{KEY}={file.url}: changed since it was listed; to list it anew, remove the index.npz of"
            f" {file.copy.parent.parent}"
        )


_require_same = functools.lru_cache(maxsize=4096)(require_same)  # once in each process


@functools.lru_cache(maxsize=1)
def _pool(process: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(AT_ONCE, "ldm_lab.data.storage.remote")


@functools.lru_cache(maxsize=1)
def _coming(process: int) -> dict[tuple[RemoteFolder, str], Future[bytes]]:
    """Objects on their way to this process; a forked process has none."""
    return {}


@functools.lru_cache(maxsize=1)
def _find_once(files: RemoteFolder, suffixes: tuple[str, ...]) -> Found:
    return sort_members(files.members(), suffixes)


def _is_md5(tag: str) -> bool:
    return len(tag) == 32 and all(digit in "0123456789abcdef" for digit in tag)


def _hash(tag: str) -> int:
    """A tag as a number of 64 bits."""
    return int.from_bytes(blake2b(tag.encode(), digest_size=8).digest(), "little", signed=True)

"""Reads and writes the objects of a store: `s3://`, `gs://`, `az://`, `http(s)://` and `file://`, by fsspec.

fsspec and not obstore: a loader worker is forked, and a request of obstore (0.12) hangs in a forked process, where
fsspec only wants a new file system. On a loopback S3 server both are as fast as the server.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import os
import random
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from ldm_lab.utils.errors import UserError, one_line
from ldm_lab.utils.terminal import say_once
from ldm_lab.utils.urls import LIBRARIES, URL, masked
from ldm_lab.utils.writing import SaveError, replacing

T = TypeVar("T")

LOGINS = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS, or gcloud auth application-default login",
    "az": "set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, or AZURE_STORAGE_CONNECTION_STRING",
}
PATIENCE = 60.0  # seconds from the first failure of a request to the last try
SLOW = 30.0  # seconds without a byte until a request counts as failed
PIECE = 2**24  # bytes of one request for part of a large object
TRANSIENT = (408, 425, 429)  # status codes below 500 that another try may cure
REFUSED = (401, 403)
SERVICES = ("botocore", "aiobotocore", "aiohttp", "azure", "google", "gcsfs", "adlfs", "s3fs", "requests")


class StoreError(UserError):
    """A store, or one of its objects, cannot be used; the one-line message names the setting and the masked URL."""


class MissingError(StoreError):
    """There is no such object, or no such bucket."""


class Object(NamedTuple):
    """An object of a store.

    Attributes:
        name: path relative to the listed URL.
        size: bytes; -1 if the store does not say.
        tag: MD5 of the content in hexadecimal if the store has one, else another text that changes with the content.
    """

    name: str
    size: int
    tag: str


@dataclass(frozen=True)
class Store:
    """The objects below a URL, or the one object at the URL. It holds no connection, so processes may share it.

    A request that fails by status 5xx or 429, by the network or by silence is repeated for up to `PATIENCE` seconds;
    one warning names the first failure.

    Args:
        root: the URL.
        key: the setting that holds the URL, for messages.

    Raises (by each method):
        StoreError: the store refuses the request, has no such object, or kept failing.
    """

    root: URL
    key: str

    def objects(self) -> Iterator[Object]:
        """All objects below the URL, in any order; page by page from S3, so that millions need little memory."""
        if self.root.scheme.startswith("http"):
            raise StoreError(
                f"{self.key}={self.root}: a web server lists no files: name a .zip or .tar file, or a set of them"
            )
        for path, info in self._pages() if self.root.scheme == "s3" else self._walk():
            name = path.removeprefix(self.root.path).lstrip("/")
            if name and not name.endswith("/"):
                yield Object(name, *_facts(info))

    def _pages(self) -> Iterator[tuple[str, dict[str, Any]]]:
        bucket, _, prefix = self.root.path.partition("/")
        request = {"Bucket": bucket, "Prefix": prefix and f"{prefix}/"}
        while request:
            page = self._try(lambda fs: fs.call_s3("list_objects_v2", **request))  # noqa: B023
            for info in page.get("Contents", ()):
                yield f"{bucket}/{info['Key']}", info
            token = page.get("NextContinuationToken")
            request = {**request, "ContinuationToken": token} if token else {}

    def _walk(self) -> Iterator[tuple[str, dict[str, Any]]]:
        yield from self._try(lambda fs: fs.find(self.root.text, detail=True)).items()

    def find(self, name: str = "") -> Object:
        """The object at a path below the URL, or at the URL."""
        return Object(name, *_facts(self._try(lambda fs: fs.info(self._at(name)), name)))

    def read(self, name: str = "", start: int = 0, stop: int | None = None) -> bytes:
        """Bytes `start` to `stop` of an object, or to its end; all of them or an error."""
        if stop is None:
            return self._try(lambda fs: fs.cat_file(self._at(name)), name)
        if stop <= start:
            return b""

        def request(fs: Any) -> bytes:  # noqa: ANN401
            content = fs.cat_file(self._at(name), start=start, end=stop)
            if len(content) > stop - start:  # a web server that ignores ranges sends everything
                content = content[start:stop]
            if len(content) != stop - start:
                raise ConnectionError(f"{len(content):,} of {stop - start:,} bytes came")
            return content

        return self._try(request, name)

    def download(self, name: str, path: Path, size: int) -> None:
        """Copy an object to a file that appears when complete. Raises `SaveError` if the disk refuses."""
        with replacing(path) as temporary, open(temporary, "wb") as file:
            if size < 0:
                file.write(self.read(name))
            for start in range(0, size, PIECE):
                file.write(self.read(name, start, min(size, start + PIECE)))

    def upload(self, path: Path, name: str) -> None:
        """Copy a file to an object, which changes as a whole."""
        if self.root.scheme == "file":
            with replacing("/" + str((self.root / name).path).lstrip("/")) as temporary:
                shutil.copyfile(path, temporary)
            return
        self._try(lambda fs: fs.put_file(str(path), self._at(name)), name)

    def require_writable(self) -> None:
        """Write a small object, so that a missing bucket is heard of before hours of work."""
        with tempfile.NamedTemporaryFile() as file:
            self.upload(Path(file.name), "started")

    def remove(self, name: str) -> None:
        """Remove an object."""
        self._try(lambda fs: fs.rm_file(self._at(name)), name)

    def _at(self, name: str) -> str:
        return (self.root / name).text if name else self.root.text

    def _try(self, request: Callable[[Any], T], name: str = "") -> T:
        end, pause = None, 0.25
        while True:
            try:
                return request(file_system(self.root.scheme, self.key))
            except Exception as error:
                if isinstance(error, UserError) or not _is_of_store(error):
                    raise
                where = f"{self.key}={self.root / name if name else self.root}"
                if _is_final(error):
                    raise self._refusal(where, error) from None
                reason, now = _reason(error), time.monotonic()
                end = end or now + PATIENCE
                if now + pause > end:
                    raise StoreError(
                        f"{where}: {reason}, for {PATIENCE:.0f} s; the same command goes on once the store answers"
                    ) from None
            self._say(reason)
            time.sleep(pause * random.SystemRandom().uniform(0.5, 1))  # not the seeded generator of the training
            pause = min(2 * pause, 8.0)

    def _say(self, reason: str) -> None:
        if (self.key, self.root) not in _said:
            _said.add((self.key, self.root))
            say_once(f"{self.key}={self.root}: {reason}: trying again, each request for up to {PATIENCE:.0f} s")

    def _refusal(self, where: str, error: Exception) -> StoreError:
        if _status(error) in REFUSED or isinstance(error, PermissionError) or "Credential" in type(error).__name__:
            login = LOGINS.get(self.root.scheme, "check the address and its login")
            return StoreError(f"{where}: the store refuses these credentials, or there are none: {login}")
        if isinstance(error, FileNotFoundError) or _status(error) == 404:
            return MissingError(f"{where}: no such bucket, container or object")
        return StoreError(f"{where}: {_reason(error)}")


def file_system(scheme: str, key: str) -> Any:  # noqa: ANN401
    """The file system of fsspec for a scheme, made once in each process. Raises `UserError` without its library."""
    with _making:
        return _file_system(scheme, key, SLOW, os.getpid())


_making = threading.Lock()
_said: set[tuple[str, URL]] = set()  # stores whose failures this process has told of


@functools.lru_cache(maxsize=8)
def _file_system(scheme: str, key: str, slow: float, process: int) -> Any:  # noqa: ANN401
    try:
        fsspec = importlib.import_module("fsspec")
        importlib.import_module(LIBRARIES[scheme])
    except ImportError as error:
        line = f"{key}={scheme}://...: {LIBRARIES[scheme]} is not installed: pip install 'ldm_lab[remote]'"
        raise UserError(line) from error
    options: dict[str, Any] = {} if scheme == "file" else {"use_listings_cache": False}
    if scheme == "s3":
        limits = {"connect_timeout": slow, "read_timeout": slow, "retries": {"max_attempts": 0}}
        options["config_kwargs"] = {**limits, "max_pool_connections": 64}
    if scheme.startswith("http"):
        timeout = importlib.import_module("aiohttp").ClientTimeout(total=None, sock_connect=slow, sock_read=slow)
        options["client_kwargs"] = {"timeout": timeout}
    made = fsspec.filesystem(scheme, skip_instance_cache=True, **options)
    if scheme == "s3":
        made.retries = 1  # `Store` repeats requests, and says so
    return made


def _facts(info: dict[str, Any]) -> tuple[int, str]:
    size = info.get("Size", info.get("size"))
    settings = info.get("content_settings") or {}
    content = settings.get("content_md5") if isinstance(settings, dict) else None
    if isinstance(content, (bytes, bytearray)):
        return int(size), bytes(content).hex()
    tag = next((info[name] for name in ("ETag", "etag", "mtime", "Last-Modified", "mtime_ns") if info.get(name)), "")
    return -1 if size is None else int(size), str(tag).strip('"')


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _library(error: BaseException) -> str:
    return type(error).__module__.split(".")[0]


def _status(error: BaseException) -> int | None:
    """The HTTP status in an exception or its causes."""
    for one in _chain(error):
        response = getattr(one, "response", None)
        inner = response.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(response, dict) else None
        names = ("status", "status_code") if _library(one) == "aiohttp" else ("status", "status_code", "code")
        for value in (inner, *(getattr(one, name, None) for name in names)):  # aiohttp has codes for broken answers
            if isinstance(value, int) and 100 <= value < 600:
                return value
    return None


def _is_of_store(error: BaseException) -> bool:
    """Whether a store, the network or a disk failed, and not our code."""
    return any(
        isinstance(one, (OSError, TimeoutError, asyncio.TimeoutError)) or _library(one) in SERVICES
        for one in _chain(error)
    )


def _is_final(error: BaseException) -> bool:
    """Whether another try would fail too."""
    if (status := _status(error)) is not None:
        return 400 <= status < 500 and status not in TRANSIENT
    return isinstance(error, (FileNotFoundError, PermissionError, SaveError)) or "Credential" in type(error).__name__


def _reason(error: BaseException) -> str:
    """A few masked words on an error."""
    if (status := _status(error)) is not None:
        return f"the store answers with status {status}"
    if any(
        isinstance(one, (TimeoutError, asyncio.TimeoutError)) or "Timeout" in type(one).__name__
        for one in _chain(error)
    ):
        return f"the store has not answered within {SLOW:.0f} s"
    return f"{type(error).__name__}: {masked(one_line(error))[:200]}"

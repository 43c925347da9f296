"""Addresses in stores, with their secrets masked wherever they are shown."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from ldm_lab.utils.errors import UserError

# Scheme -> the library that fsspec needs for it.
LIBRARIES = {"s3": "s3fs", "gs": "gcsfs", "az": "adlfs", "http": "aiohttp", "https": "aiohttp", "file": "fsspec"}
_ADDRESS = re.compile(r"\b[a-z][a-z0-9+.-]*://[^\s'\"<>]+")


@dataclass(frozen=True, repr=False)
class URL:
    """An address in a store. `str(url)` and `repr(url)` mask passwords and query strings, which may be signed.

    Args:
        text: the address as typed.

    Raises:
        UserError: no store has this scheme.
    """

    text: str = field(repr=False)

    def __post_init__(self) -> None:
        if self.scheme not in LIBRARIES:
            raise UserError(f"{masked(self.text)}: no such kind of store; there are {', '.join(LIBRARIES)}")

    def __str__(self) -> str:
        return masked(self.text)

    __repr__ = __str__

    def __truediv__(self, name: str) -> URL:
        path, sign, query = self._parted()
        return URL(f"{path.rstrip('/')}/{name}{sign}{query}")

    @property
    def scheme(self) -> str:
        """`s3`, `https`, ..."""
        return self.text.partition("://")[0].lower()

    @property
    def path(self) -> str:
        """Everything after `://` but the query and a final slash: bucket and key, or host and path."""
        return self._parted()[0].partition("://")[2].rstrip("/")

    @property
    def name(self) -> str:
        """The part of the path after the last slash."""
        return self.path.rpartition("/")[2]

    @property
    def identity(self) -> str:
        """The address without user, password and query: equal for equal objects."""
        return f"{self.scheme}://{_without_login(self.path)}"

    def _parted(self) -> tuple[str, str, str]:
        # Keys of S3 may contain question marks.
        return self.text.partition("?") if self.scheme.startswith("http") else (self.text, "", "")


def is_url(text: object) -> bool:
    """Whether a setting names a store and not a local path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", str(text)) is not None


def masked(text: str) -> str:
    """`text` with `***` for the passwords and the queries of all addresses in it."""
    return _ADDRESS.sub(lambda found: _masked(found[0]), text)


def without_secrets(value: Any) -> Any:  # noqa: ANN401
    """Plain data with all its texts masked: safe to write into a run's folder."""
    if isinstance(value, dict):
        return {key: without_secrets(part) for key, part in value.items()}
    if isinstance(value, list):
        return [without_secrets(part) for part in value]
    return masked(value) if isinstance(value, str) else value


def _masked(address: str) -> str:
    scheme, sign, rest = address.partition("://")
    host, slash, path = rest.partition("/")
    login = "***@" if "@" in host else ""
    if scheme.startswith("http") and "?" in rest:
        path = f"{path.partition('?')[0]}?***"
    return f"{scheme}{sign}{login}{host.rpartition('@')[2]}{slash}{path}"


def _without_login(path: str) -> str:
    host, slash, rest = path.partition("/")
    return f"{host.rpartition('@')[2]}{slash}{rest}"

"""Latent caches that machines without a common disk share through a store: `paths.cache=s3://...`.

    <paths.cache>/latents/<key>/    the files of the local folder, see `ldm_lab.data.latents`

Training reads the local folder by memory map, so each machine fetches every shard. A machine encodes a shard only if
the store lacks it, and uploads it at once. There are no locks between machines: an object appears as a whole, and
two machines that encode the same shard write the same latents.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from ldm_lab.data.latents import META, UNKNOWN, Error, LatentCache, is_intact
from ldm_lab.utils.reading import LoadError
from ldm_lab.utils.stores import MissingError, Store
from ldm_lab.utils.urls import URL
from ldm_lab.utils.writing import replacing


class SharedLatentCache(LatentCache):
    """A latent cache in a local folder and in a store.

    Args:
        shared: `paths.cache`.
        arguments: those of `LatentCache`.

    Raises (by each method):
        StoreError: the store cannot be read or written.
    """

    def __init__(self, shared: URL, *arguments: Any) -> None:  # noqa: ANN401
        super().__init__(*arguments)
        self.store = Store(shared / "latents" / self.key, "paths.cache")

    def order(self, missing: list[int], part: float) -> list[int]:
        """A random order, in which two machines rarely come to the same shard at the same time."""
        return random.SystemRandom().sample(missing, len(missing))  # not the seeded generator of the training

    @contextlib.contextmanager
    def claim(self, shard: int) -> Iterator[bool]:
        """As `LatentCache.claim`, but fetches a shard that the store has. Raises `LoadError` if it is damaged there."""
        with super().claim(shard) as claimed:
            yield claimed and not self._fetch(shard)

    def _fetch(self, shard: int) -> bool:
        path = self.path(shard)
        try:
            content = self.store.read(path.name)
        except MissingError:
            return False
        with replacing(path) as temporary:
            temporary.write_bytes(content)
            if not is_intact(temporary):
                where = f"paths.cache={self.store.root / path.name}"
                raise LoadError(f"{where}: damaged; remove this object, and the same command encodes again")
        return True

    def write(self, shard: int, moments: Tensor, skipped: dict[int, str], error: Error = UNKNOWN) -> None:
        """As `LatentCache.write`, and upload the shard."""
        super().write(shard, moments, skipped, error)
        self.store.upload(self.path(shard), self.path(shard).name)

    def share(self) -> None:
        """Upload what is in the folder and not in the store."""
        there: set[str] = set()
        with contextlib.suppress(MissingError):  # a `file://` store without this folder
            there = {found.name for found in self.store.objects()}
        for path in (self.folder / META, *(self.path(shard) for shard in self.shards)):
            if path.name not in there and path.is_file():
                self.store.upload(path, path.name)

"""Data sets of the Hugging Face hub, and local folders of parquet files, by the library `datasets`."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from ldm_lab.data.images import FolderImages
from ldm_lab.data.storage.files import Files, Found, Place
from ldm_lab.utils import cache_folder, shell
from ldm_lab.utils.errors import UserError, first_line
from ldm_lab.utils.limits import Harmless

KEY = "data.name"


class HubImages(FolderImages):
    """The images of one column of a data set of the hub, or of a folder of parquet files.

    A row's name is its number with nine digits. As with files, a hash of the name decides which images are held out,
    and names and sizes make the fingerprint: the hub's data set and its parquet files in a folder are the same images.

    Args:
        root: `owner/name` or `owner/name@revision` on the hub, or a local folder of `.parquet` files.
        split: "train" or "val".
        image_size: pixels, one number or (height, width).
        column: column of the images.
        part: the part of the data set to use, as the hub calls its splits.
        subset: the subset of a data set that has several.
        options: see `FolderImages`.
    """

    def __init__(
        self,
        root: Annotated[str | Path | None, Harmless],
        split: str,
        image_size: int | Sequence[int],
        column: str = "image",
        part: str = "train",
        subset: str | None = None,
        **options: Any,  # noqa: ANN401
    ) -> None:
        self._choice = column, part, subset
        super().__init__(root, split, image_size, **options)

    def open(self, root: str | Path | None, cache_dir: str | Path | None, cache_limit: str | int | None) -> Files:
        """The rows of a data set."""
        if not root:
            raise UserError(f"{KEY} is not set: name a data set, {KEY}=owner/name, or a folder of .parquet files")
        folder = None if cache_dir is None else str(cache_folder.local(cache_dir) / "datasets")
        return HubFiles(Path(root), *self._choice, folder)


@dataclass(frozen=True)
class HubFiles(Files):
    """The rows of a data set. Place: row, size.

    Args:
        root: name on the hub, or folder.
        column: column of the images.
        part: part of the data set.
        subset: subset of the data set.
        cache_dir: folder for the library's files; None: the library's own.
    """

    root: Path
    column: str
    part: str
    subset: str | None
    cache_dir: str | None

    def members(self) -> Iterator[tuple[str, Place]]:
        """Every row."""
        for row, size in enumerate(_sizes(self).tolist()):
            yield f"{row:09}", (row, size)

    def find(self, suffixes: tuple[str, ...]) -> Found:
        """All rows: a column of images has no other files."""
        sizes = _sizes(self)
        names = np.array([b"%09d" % row for row in range(len(sizes))], np.bytes_)
        return Found(names, np.stack([np.arange(len(sizes)), sizes], axis=1), Counter())

    def read(self, name: str, place: Place) -> bytes:
        """The content of a row's image file."""
        found = _rows(self)[place[0]][self.column]
        return Path(found["path"]).read_bytes() if found["bytes"] is None else found["bytes"]

    def size(self, name: str, place: Place) -> int:
        """Size of a row's image file."""
        return place[1]


@functools.lru_cache(maxsize=2)
def _rows(files: HubFiles) -> Any:  # noqa: ANN401
    """The data set, memory-mapped, with its images as files and not decoded."""
    where = f"{KEY}={files.root}"
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{where}: datasets is not installed: pip install 'ldm_lab[hub]'") from error
    try:
        found = _load(datasets, files)
        if files.column in found.column_names:
            return found.select_columns([files.column]).cast_column(files.column, datasets.Image(decode=False))
    except UserError:
        raise
    except Exception as error:  # the library raises almost anything
        raise UserError(f"{where}: cannot be loaded: {first_line(error)}") from error
    raise UserError(f"{where}: data.column={files.column}: its columns are {', '.join(found.column_names)}")


def _load(datasets: Any, files: HubFiles) -> Any:  # noqa: ANN401
    folder = shell.path(files.root)
    if folder.is_dir():
        parts = sorted(map(str, folder.rglob("*.parquet")))
        if not parts:
            raise UserError(f"{KEY}={folder}: no .parquet files in this folder")
        return datasets.load_dataset("parquet", data_files=parts, split="train", cache_dir=files.cache_dir)
    name, _, revision = str(files.root).partition("@")
    choice = {"split": files.part, "revision": revision or None, "cache_dir": files.cache_dir}
    return datasets.load_dataset(name, files.subset, **choice)


@functools.lru_cache(maxsize=2)
def _sizes(files: HubFiles) -> np.ndarray:
    """Bytes of each row's image file, `(N,)`, int64; reads offsets only."""
    import pyarrow.compute as pc

    chunks = _rows(files).data.column(files.column).chunks
    sizes = [pc.fill_null(pc.binary_length(pc.struct_field(chunk, "bytes")), 0) for chunk in chunks]
    return np.concatenate([size.to_numpy(zero_copy_only=False) for size in sizes] or [np.empty(0)]).astype(np.int64)

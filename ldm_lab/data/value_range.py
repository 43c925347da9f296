"""Range of a data set's values: given, of its integers, or measured once and kept in a file."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import filelock
from tqdm import tqdm

from ldm_lab.utils import cache_folder
from ldm_lab.utils.arguments import is_number
from ldm_lab.utils.errors import UserError
from ldm_lab.utils.pixels import PixelFormat
from ldm_lab.utils.reading import read_json
from ldm_lab.utils.writing import require_writable, write_json

ValueRange = Sequence[float] | Literal["measure"] | None
Range = tuple[float, float]
AHEAD = 256  # images that are read at a time


def parse_range(value_range: ValueRange, channels: int) -> Range | Literal["measure"] | None:
    """`data.value_range` as two numbers, "measure" or None. Raises `UserError` for anything else."""
    if value_range is None or value_range == "measure":
        return value_range
    if isinstance(value_range, str) or len(value_range) != 2 or not all(map(is_number, value_range)):
        raise UserError(f"data.value_range={value_range}: give [LOW,HIGH], or measure")
    low, high = map(float, value_range)
    return PixelFormat(channels, (low, high)).value_range


def measured(
    extremes: Callable[[int], Range | None], count: int, cache_dir: str | Path | None, key: Callable[[], str]
) -> Range:
    """The smallest and the largest value of all images; read from a file if they were measured before.

    Processes that share `cache_dir` measure once: the others wait.

    Args:
        extremes: index of an image -> its smallest and largest value; None for a skipped file.
        count: number of images.
        cache_dir: parent folder of the file, `ranges/<key>.json`; None: measure without a file.
        key: text that identifies the images and their channels.

    Raises:
        UserError: an image cannot be used, or all values are equal.
    """
    if cache_dir is None:
        return _measure(extremes, count)
    path = cache_folder.local(cache_dir) / "ranges" / f"{key()}.json"
    if not path.is_file():
        require_writable(path.parent, "paths.cache=")
        path.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(path.with_suffix(".lock")):
            if not path.is_file():  # another process may have measured meanwhile
                low, high = _measure(extremes, count)
                write_json(path, {"low": low, "high": high, "images": count})
    found = read_json(path)
    return parse_range([found.get("low"), found.get("high")], 1)


def _measure(extremes: Callable[[int], Range | None], count: int) -> Range:
    low, high = math.inf, -math.inf
    with ThreadPoolExecutor(os.cpu_count()) as threads, tqdm(total=count, desc="measuring values", unit="image") as bar:
        for some in _parts(range(count)):
            for pair in threads.map(extremes, some):
                low, high = (low, high) if pair is None else (min(low, pair[0]), max(high, pair[1]))
                bar.update()
    if not low < high:
        raise UserError(f"data.value_range=measure: all values are {low:g}: give data.value_range=[LOW,HIGH]")
    return low, high


def _parts(indices: Iterable[int]) -> Iterable[list[int]]:
    """Lists of `AHEAD` indices, as `ThreadPoolExecutor.map` would queue them all at once."""
    rest = iter(indices)
    return iter(lambda: list(itertools.islice(rest, AHEAD)), [])

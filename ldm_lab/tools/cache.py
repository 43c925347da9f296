"""List cached latents and copies of images from stores, and remove what is not needed any more.

Without a flag they are listed: key, size, when a run last used them, and what they are of. Only caches are removed,
only when asked for by one of --prune, --older-than and --all, and of their folders only the files that they are made
of. A cache that a run is filling is left alone. --verify reads all latents and compares checksums, which a training,
that reads by memory map, does not; copies of images are checked whenever they are read.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ldm_lab.data import latents
from ldm_lab.data.latents import KEY, META, is_intact
from ldm_lab.data.storage import copies
from ldm_lab.utils.cache_folder import default_folder, local
from ldm_lab.utils.errors import UserError
from ldm_lab.utils.locks import if_free
from ldm_lab.utils.reading import LoadError, read_json

FLOAT32 = "32-true"  # name of this precision in a key, see `ldm_lab.training.latents`
KINDS = {"latents": (latents.OWN_FILE, META), "stores": (copies.OWN_FILE, copies.SOURCE)}  # files; which is touched
UNITS = {"h": 3600, "d": 86400, "w": 7 * 86400}


class Entry(NamedTuple):
    """One cache.

    Attributes:
        folder: its folder, named by its key.
        files: its files.
        size: bytes.
        used: time of the last use by a run, in seconds since 1970.
        what: description of its content.
    """

    folder: Path
    files: list[Path]
    size: int
    used: float
    what: str


def main(argv: list[str]) -> None:
    """List, check or remove caches. Raises `UserError` for invalid flags and for corrupt shards."""
    options = parse(argv)
    found = entries(options.folder)
    if options.verify:
        verify(found)
    if unknown := sorted(set(options.prune) - {entry.folder.name for entry in found}):
        raise UserError(f"--prune {unknown[0]}: {options.folder} has no cache of this key")
    latest = time.time() - options.older_than if options.older_than else None
    chosen = [
        entry
        for entry in found
        if options.all or entry.folder.name in options.prune or (latest is not None and entry.used < latest)
    ]
    if not (options.all or options.prune or options.older_than or options.verify):
        print(f"{options.folder}: {len(found)} cache(s), {_gigabytes(sum(e.size for e in found))}")
        for entry in found:
            print(line(entry))
    for entry in chosen:
        print(f"{'removed' if remove(entry) else 'in use, left'}: {line(entry)}")


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse and check the flags."""
    text = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m ldm_lab cache", description=__doc__, formatter_class=text)
    parser.add_argument("--prune", nargs="+", default=[], metavar="KEY", help="remove these")
    parser.add_argument("--older-than", metavar="30d", help="remove those not used for so many h, d or w")
    parser.add_argument("--all", action="store_true", help="remove all")
    parser.add_argument("--verify", action="store_true", help="read all shards and compare their checksums")
    parser.add_argument("--folder", type=local, default=default_folder(), help="paths.cache (default: %(default)s)")
    options = parser.parse_args(argv)
    if options.older_than is not None:
        if not (age := re.fullmatch(r"(\d+)([hdw])", options.older_than)):
            raise UserError(f"--older-than {options.older_than}: give hours, days or weeks, such as 12h, 30d or 8w")
        options.older_than = max(1, int(age[1])) * UNITS[age[2]]
    return options


def entries(root: Path) -> list[Entry]:
    """All caches in `paths.cache`, most recently used first; links are ignored."""
    folders = [folder for kind in KINDS if (root / kind).is_dir() for folder in (root / kind).iterdir()]
    found = [entry(f) for f in folders if KEY.fullmatch(f.name) and f.is_dir() and not f.is_symlink()]
    return sorted(found, key=lambda entry: -entry.used)


def entry(folder: Path) -> Entry:
    """The cache in one folder."""
    own, touched = KINDS[folder.parent.name]
    found = (Path(parent, name) for parent, _, names in os.walk(folder) for name in names)
    statuses = {path: path.lstat() for path in found if own.fullmatch(path.relative_to(folder).as_posix())}
    meta = statuses.get(folder / touched)
    used = meta.st_mtime if meta else max((status.st_mtime for status in statuses.values()), default=0.0)
    return Entry(folder, sorted(statuses), sum(status.st_size for status in statuses.values()), used, _what(folder))


def _what(folder: Path) -> str:
    return "".join(letter for letter in _described(folder) if letter.isprintable())[:200]


def _described(folder: Path) -> str:
    if folder.parent.name == "stores":
        try:
            return f"copies of {(folder / copies.SOURCE).read_text(encoding='utf-8').strip()}"
        except (OSError, ValueError):
            return f"copies of a store: no {copies.SOURCE} that says which"
    try:
        meta = read_json(folder / META)
        size = " x ".join(str(int(side)) for side in meta["transform"]["image_size"])
        mirrored = ", mirrored too" if meta["shape"][0] == 2 else ""
        kind, images = (str(meta[part]["class"]) for part in ("autoencoder", "images"))
        weights = str(meta["autoencoder"]["weights"])
        precision = meta.get("precision", FLOAT32)
        encoded = "" if precision == FLOAT32 else f" encoded in {precision}"
        return f"{int(meta['count']):,} {images} of {size}{mirrored}, {meta['dtype']}{encoded}, by {kind} {weights}"
    except (LoadError, LookupError, TypeError, ValueError):
        return f"damaged: no {META} that says what it is"


def line(entry: Entry) -> str:
    """One line: key, size, last use, description."""
    days = max(0, int((time.time() - entry.used) / UNITS["d"]))
    return f"{entry.folder.name}  {_gigabytes(entry.size):>9}  used {days:>3} day(s) ago  {entry.what}"


def verify(found: list[Entry]) -> None:
    """Check every shard of every cache. Raises `UserError`, which names the corrupt shards."""
    damaged = []
    for entry in found:
        if entry.folder.parent.name != "latents":
            continue
        shards = [path for path in entry.files if path.suffix == ".safetensors" and not path.name.startswith(".")]
        bad = [path for path in shards if not (path.is_file() and is_intact(path))]
        print(f"{entry.folder.name}  {len(shards) - len(bad)} of {len(shards)} shards are as they were written")
        damaged += bad
    if damaged:
        names = ", ".join(str(path) for path in damaged[:3])
        more = f" and {len(damaged) - 3} more" if len(damaged) > 3 else ""
        raise UserError(f"damaged: {names}{more}; remove these files, and the next training encodes them again")


def remove(entry: Entry) -> bool:
    """Remove a cache, unless a run is filling it; returns whether it was removed. Foreign files stay."""
    with _held(entry) as free:
        if free:
            # Remove the description last, so that an interrupted removal leaves a recognisable cache.
            for path in sorted(entry.files, key=lambda path: path.name in (META, copies.SOURCE)):
                path.unlink(missing_ok=True)
    if free:
        for folder, _, _ in os.walk(entry.folder, topdown=False):
            with contextlib.suppress(OSError):  # foreign files
                os.rmdir(folder)
    return free


@contextlib.contextmanager
def _held(entry: Entry) -> Iterator[bool]:
    """Take all locks; yields false if another process has one, of a shard, a list or an archive."""
    with contextlib.ExitStack() as stack:
        yield all(stack.enter_context(if_free(path)) for path in entry.files if path.name.endswith(".lock"))


def _gigabytes(size: int) -> str:
    return f"{size / 2**30:,.2f} GB" if size >= 2**27 else f"{size / 2**20:,.1f} MB"

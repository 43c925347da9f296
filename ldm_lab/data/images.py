"""Data set of the images of a folder or archive."""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from PIL import Image, ImageColor

from ldm_lab.data.arrays import ArrayImage, MismatchError
from ldm_lab.data.dataset import ImageDataset, digest, sorted_marks
from ldm_lab.data.decoding.arrays import NPY_FILES
from ldm_lab.data.decoding.pictures import EXTENSIONS, FORMATS, NoImageError, PixelLimitError, limited
from ldm_lab.data.decoding.reader import PixelReader
from ldm_lab.data.held_out import is_held_out
from ldm_lab.data.storage.archives import ARCHIVES
from ldm_lab.data.storage.files import Files, Folder, Found, Place
from ldm_lab.data.storage.shards import Shards, open_files
from ldm_lab.data.transforms import covering_size
from ldm_lab.data.value_range import Range, ValueRange, measured, parse_range
from ldm_lab.utils import signatures
from ldm_lab.utils.errors import UserError, first_line
from ldm_lab.utils.limits import Count, Harmless, Whole
from ldm_lab.utils.pixels import RGB_8_BIT, PixelFormat
from ldm_lab.utils.stores import StoreError

OnError = Annotated[Literal["raise", "skip"], Harmless]
MaxPixels = Annotated[Count | None, Harmless]


class ImageError(UserError):
    """An image cannot be used."""


class FolderImages(ImageDataset):
    """The images of a folder or archive with all subfolders: files that end in one of `decode.EXTENSIONS`.

    Hidden files and folders (names that begin with a dot) are skipped; links are followed in folders and
    skipped in archives. Images are sorted by their path relative to `root`. Only a hash of that path
    decides which images are held out, so that added or removed images move no other image; if chance
    leaves one split empty, one image changes sides. The type of a file follows from its content, not its
    name; of several images in a file, the first is used. Images are made upright (EXIF), composited over
    `background` if transparent, converted to 8-bit RGB, and resized until the shorter side fits (see
    `transforms`). With other `channels` or a `value_range`, images stay as deep as their files (see `arrays`).
    `.npy` files are images where there are no pictures.

    With `on_error="skip"` the next decodable file of the split replaces a file that cannot be decoded, the
    same for every epoch and batch size. Items then have a further entry: `skipped`, the errors of the
    skipped files, a line each; empty for most items.

    Args:
        root: the folder, or a zip archive, or an uncompressed tar archive, or a set of archives (`x-{00..99}.tar`);
            each also as a URL (see `utils.stores`).
        split: "train" or "val".
        image_size: pixels, one number or (height, width).
        val_fraction: fraction of the images to hold out, in (0, 1).
        random_crop: use random crops for training, else centre crops.
        flip: mirror half of the training images.
        background: colour behind transparent images, a name or `#rrggbb`.
        on_error: reaction to a file that cannot be decoded, "raise" or "skip".
        max_pixels: maximum pixels of an image; None: Pillow's limit.
        channels: number of channels.
        value_range: (low, high), the values that become -1 and 1; "measure": the smallest and the largest value of
            all images; None: 0 to 255, or 0 to 65535 if `channels` is not 3 and the first file has 16 bits.
        seed: seed of crops and flips.
        cache_dir: folder for the measured range and for copies of what a store holds; None: neither is kept.
        cache_limit: maximum size of these copies, such as "200GB"; None: no limit.

    Attributes:
        pixels_key: the setting of `max_pixels`, for messages.

    Raises:
        UserError: an argument is invalid, or the folder is missing or holds no images.
        ImageError: (on access) a file cannot be decoded, or with "skip" too many in a row; the message names it.
    """

    MOST_IN_A_ROW = 100  # skipped files; after more, the cause must lie elsewhere
    pixels_key = "data.max_pixels="

    def __init__(
        self,
        root: str | Path | None,
        split: str,
        image_size: int | Sequence[int],
        val_fraction: float = 0.05,
        random_crop: bool = False,
        flip: bool = False,
        background: str = "white",
        on_error: OnError = "raise",
        max_pixels: MaxPixels = None,
        seed: Whole = 0,
        channels: Count = 3,
        value_range: ValueRange = None,
        cache_dir: str | Path | None = None,
        cache_limit: Annotated[str | int | None, Harmless] = None,
    ) -> None:
        super().__init__(split, image_size, random_crop=random_crop, flip=flip, seed=seed)
        self.files = self.open(root, cache_dir, cache_limit)
        if not 0 < val_fraction < 1:
            raise UserError(f"data.val_fraction={val_fraction}: give a part between 0 and 1, e.g. 0.05")
        self.val_fraction = val_fraction
        try:
            self.background = ImageColor.getrgb(str(background))[:3]
        except ValueError:
            raise UserError(f"data.background={background!r}: give a colour, e.g. white or #ffffff") from None
        signatures.require("data.on_error", on_error, OnError)
        self.on_error = on_error
        self.max_pixels = max_pixels
        self.channels, self.value_range = channels, parse_range(value_range, channels)
        self.cache_dir = cache_dir

    @functools.cached_property
    def pixels(self) -> PixelFormat:
        """Channels and range of the images; opens files unless both are given. Raises `ImageError` as `read`."""
        if self._reader.is_plain:
            return RGB_8_BIT
        if isinstance(self.value_range, tuple):
            return PixelFormat(self.channels, self.value_range)
        find = self._measured if self.value_range == "measure" else self._full_range
        return PixelFormat(self.channels, find(self._list()))

    @property
    def _reader(self) -> PixelReader:
        return PixelReader(self.channels, self.value_range, self.background, self.max_pixels)

    def _measured(self, every: Found) -> Range:
        """The smallest and the largest value of all images."""

        def key() -> str:  # with times, as arrays of other values often have the same size
            places = (every.at(index) for index in range(len(every.names)))
            return digest([self.channels, *((self.files.identity(*at), self.files.modified(*at)) for at in places)])

        with limited(self.max_pixels):  # outside of the threads that measure
            extremes = functools.partial(self._unless_skipped, self._reader.extremes, every)
            return measured(extremes, len(every.names), self.cache_dir, key)

    def _full_range(self, every: Found) -> Range:
        """Range of the integers in the first file."""
        for index in range(min(self.MOST_IN_A_ROW, len(every.names))):
            if found := self._unless_skipped(self._reader.full_range, every, index):
                return found
        raise ImageError(f"data.root={self.files.root}: its first files cannot be decoded")

    def _unless_skipped(self, use: Callable[[bytes], Range], every: Found, index: int) -> Range | None:
        """`use(content)` of a file; None if it fails and such files are skipped."""
        with suppress(ImageError) if self.on_error == "skip" else nullcontext(), self._blaming(every, index):
            return use(self.files.read(*every.at(index)))
        return None

    def prepare(self) -> None:
        """Measure the range."""
        _ = self.pixels

    def open(self, root: str | Path | None, cache_dir: str | Path | None, cache_limit: str | int | None) -> Files:
        """The files of a root, see `open_files`."""
        return open_files(root, cache_dir, cache_limit)

    @functools.cached_property
    def _found(self) -> Found:
        """This split's images."""
        found = self._list()
        held_out = is_held_out(found.names, self.val_fraction)
        chosen = held_out if self.split == "val" else ~held_out
        return Found(found.names[chosen], found.places[chosen], found.others)

    def _list(self) -> Found:
        """The images of both splits: pictures, else `.npy` files."""
        found = self.files.find(EXTENSIONS)
        if not len(found.names) and NPY_FILES[0] in found.others:
            found = self.files.find(NPY_FILES)
        if len(found.names) < 2:
            there = "one image in it" if len(found.names) else f"no images in it{self._instead(found.others)}"
            wanted = ", ".join(extension[1:] for extension in (*EXTENSIONS, *NPY_FILES))
            raise UserError(f"data.root={self.files.root}: {there}; expected two or more files of type {wanted}")
        return found

    def _instead(self, others: Counter[str]) -> str:
        """The end of the message on a root without images: the files that it holds."""
        archives = sorted(name for name, _ in self.files.members() if name.lower().endswith(ARCHIVES))
        if archives and isinstance(self.files, Folder):
            first = self.files.root / archives[0]
            return f", but {len(archives):,} archive(s): name one of them, data.root={first}"
        return f", but {endings(others, 2)}" if others else ""

    @property
    def names(self) -> np.ndarray:
        """Paths of this split's images below `root`, POSIX, sorted; `(N,)`, bytes (see `os.fsencode`)."""
        return self._found.names

    def passed_over(self) -> str:
        """Numbers of files that are not images, by extension; "" without such files."""
        return endings(self._found.others, 4)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        if self.on_error == "skip":
            return self._next_decodable(*(key if isinstance(key, tuple) else (key, None)))
        try:
            return super().__getitem__(key)
        except ImageError as error:
            raise ImageError(f"{error}; data.on_error=skip passes over such files") from error

    def __getitems__(self, keys: list[int | tuple[int, int]]) -> list[dict[str, Any]]:
        """The items of a batch; their files may be fetched side by side."""
        indices = [key[0] if isinstance(key, tuple) else key for key in keys]
        self.files.ahead(
            [self._locate(index) for index in indices], stream=self.by_shards and isinstance(keys[0], tuple)
        )
        return [self[key] for key in keys]

    def groups(self, window: int) -> np.ndarray | None:
        """See `ImageDataset.groups`."""
        if not isinstance(self.files, Shards):
            return None
        self.files.require_room(window)
        return self._found.places[:, 0]

    def _next_decodable(self, index: int, position: int | None) -> dict[str, Any]:
        errors = []
        for step in range(min(self.MOST_IN_A_ROW, len(self))):
            try:
                item = super().__getitem__(((index + step) % len(self) if step else index, position))
            except ImageError as error:
                errors.append(str(error))
            else:
                return {**item, "position": index if position is None else position, "skipped": "\n".join(errors)}
        raise ImageError(f"{len(errors)} file(s) in a row cannot be decoded; the first: {errors[0]}")

    def transform(self) -> dict[str, Any]:
        """The settings of every data set, plus the background, and channels and range other than 8-bit RGB."""
        known = {**super().transform(), "background": list(self.background)}
        if self._reader.is_plain:
            return known
        bits = 8 if self._reader.is_8_bit(self.pixels) else 32  # in which images are resized
        return known | {"channels": self.channels, "value_range": list(self.pixels.value_range), "bits": bits}

    def path(self, index: int) -> Path:
        """The path of image `index`, for messages only, as a path into an archive does not exist."""
        return self.files.root / os.fsdecode(self.names[index])

    def read(self, index: int) -> Image.Image | ArrayImage:
        """Image `index`, upright, in its original size: 8-bit RGB or grey, or of any depth (see `pixels`)."""
        with self._blaming(self._found, index):
            picture = self._reader.image(self.files.read(*self._locate(index)), self.pixels)
            covering_size(picture, self.image_size)
            return picture

    @contextmanager
    def _blaming(self, found: Found, index: int) -> Iterator[None]:
        """Turn any failure with an image of `found` into an `ImageError` that names its file."""
        path = self.files.root / os.fsdecode(found.names[index])
        try:
            yield
        except StoreError:  # no fault of the image: `on_error` does not pass over it
            raise
        except (NoImageError, MismatchError) as error:
            raise ImageError(f"{path}: {error}") from None
        except PixelLimitError as error:
            raise ImageError(f"{path}: {error}: {self.pixels_key}{error.pixels} takes it") from error
        except Exception as error:  # decoders raise almost anything on corrupt data
            reason = getattr(error, "strerror", None) or first_line(error)
            raise ImageError(f"{path}: cannot be read: {reason}") from error

    def format(self, index: int) -> str | None:
        """Pillow's format name of image `index`; None if it is no image."""
        try:
            with Image.open(BytesIO(self.files.read(*self._locate(index))), formats=FORMATS) as image:
                return image.format
        except Exception:  # decoders raise almost anything
            return None

    def fingerprint(self) -> str:
        """Hash of the relative paths and sizes of this split's files; equal for a folder and its archive."""
        return digest(self.marks().tolist())

    def marks(self) -> np.ndarray:
        """Hashes of each file's path and size."""
        return sorted_marks(self.files.identity(*self._locate(index)) for index in range(len(self)))

    def _locate(self, index: int) -> tuple[str, Place]:
        return self._found.at(index)


def endings(counts: Counter[str], most: int) -> str:
    """The `most` frequent extensions with their counts: `1,203 .txt files, 2 without an ending and 5 more`."""
    shown = counts.most_common(most)
    parts = [f"{count:,} {kind} files" if kind else f"{count:,} without an ending" for kind, count in shown]
    if rest := counts.total() - sum(count for _, count in shown):
        parts.append(f"{rest:,} more")
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)

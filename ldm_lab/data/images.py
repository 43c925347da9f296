"""Any folder of images as a data set."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor, UnidentifiedImageError

from ldm_lab.data.dataset import ImageDataset, digest
from ldm_lab.data.transforms import to_rgb

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
FORMATS = ("JPEG", "PNG", "WEBP", "BMP")  # whatever its name, a file is never handed to another decoder


class ImageError(ValueError):
    """An image cannot be used: one line, also after its way out of a loader's worker."""

    def __init__(self, message: str) -> None:
        # A DataLoader hands a worker's whole traceback over as the message: its last line is ours.
        last = (message.strip().splitlines() or [""])[-1]
        super().__init__(last.removeprefix(f"{__name__}.ImageError: "))


class FolderImages(ImageDataset):
    """The images of a folder, nested or not: jpg, jpeg, png, webp and bmp, in capitals or not.

    Hidden files and folders (names that begin with a dot) are passed over, links are followed. Images
    are sorted by their path relative to `root`. A hash of that path alone decides which are held out,
    so that images that come or go move no others; only where chance would leave one side empty, one
    image changes over. Pictures are made upright (EXIF), laid over `background` where they are
    transparent, converted to 8-bit RGB, and resized until the shorter side fits (see `transforms`).

    Args:
        root: the folder.
        split: "train" or "val".
        image_size: pixels, one number or (height, width).
        val_fraction: part of the images that is held out, in (0, 1).
        random_crop: crop for training at random, else in the middle.
        flip: exchange left and right in half of the training images.
        background: colour behind transparent pictures, a name or `#rrggbb`.
        seed: of crops and flips.

    Raises:
        ValueError: an argument cannot be used, or the folder is missing or holds no images.
        ImageError: (on access) a file cannot be decoded; the message names it.
    """

    def __init__(
        self,
        root: str | Path | None,
        split: str,
        image_size: int | Sequence[int],
        val_fraction: float = 0.05,
        random_crop: bool = False,
        flip: bool = False,
        background: str = "white",
        seed: int = 0,
    ) -> None:
        super().__init__(split, image_size, random_crop=random_crop, flip=flip, seed=seed)
        self.root = _existing_folder(root)
        if not 0 < val_fraction < 1:
            raise ValueError(f"data.val_fraction={val_fraction}: give a part between 0 and 1, e.g. 0.05")
        self.val_fraction = val_fraction
        try:
            self.background = ImageColor.getrgb(str(background))[:3]
        except ValueError:
            raise ValueError(f"data.background={background!r}: give a colour, e.g. white or #ffffff") from None

    @functools.cached_property
    def names(self) -> np.ndarray:
        """Paths of this split's images below `root`, POSIX, sorted; `(N,)`, bytes (see `os.fsencode`)."""
        names = sorted(find_images(self.root))
        if len(names) < 2:
            found = "one image" if names else "no images"
            wanted = ", ".join(extension[1:] for extension in EXTENSIONS)
            raise ValueError(f"data.root={self.root}: {found} in it; expected two or more files of type {wanted}")
        train, val = split_by_hash(names, self.val_fraction)
        # One block of memory: millions of Python strings would be copied, page by page, into every worker.
        return np.array([os.fsencode(name) for name in (train if self.split == "train" else val)])

    def __len__(self) -> int:
        return len(self.names)

    def path(self, index: int) -> Path:
        """The file of image `index`."""
        return self.root / os.fsdecode(self.names[index])

    def read(self, index: int) -> Image.Image:
        """Image `index`, upright, 8-bit RGB, in its own size."""
        path = self.path(index)
        try:
            with Image.open(path, formats=FORMATS) as image:
                return to_rgb(image, self.background)
        except UnidentifiedImageError:
            raise ImageError(f"{path}: not an image; expected {', '.join(FORMATS)}") from None
        except Exception as error:  # decoders raise almost anything on damaged data
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ImageError(f"{path}: cannot be decoded; expected {', '.join(FORMATS)}: {reason}") from error

    def fingerprint(self) -> str:
        """Stands for the relative paths and sizes in bytes of this split's files."""
        return digest(f"{self.path(index).stat().st_size} {name!r}" for index, name in enumerate(self.names.tolist()))


def find_images(root: Path) -> Iterator[str]:
    """Relative POSIX paths of the image files below `root`, in no particular order."""
    seen = set()  # folders, by device and inode: links may lead round in circles
    pending = [""]
    while pending:
        folder = pending.pop()
        try:
            status = os.stat(root / folder)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(root / folder) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if entry.is_dir():
                        pending.append(f"{folder}{entry.name}/")
                    elif entry.name.lower().endswith(EXTENSIONS) and entry.is_file():
                        yield f"{folder}{entry.name}"
        except OSError as error:
            raise ValueError(f"data.root: the folder {root / folder} cannot be listed: {error.strerror}") from error


def split_by_hash(names: Sequence[str], val_fraction: float) -> tuple[list[str], list[str]]:
    """Part `names` (two or more) into training and held-out ones, by a hash of each name; neither is empty."""
    places = {name: _place(name) for name in names}
    smallest, largest = min(names, key=places.get), max(names, key=places.get)
    val = {name for name in names if places[name] < val_fraction} - {largest} | {smallest}
    return [name for name in names if name not in val], [name for name in names if name in val]


def _place(name: str) -> float:
    """A number in [0, 1) that depends on the name alone."""
    return int.from_bytes(blake2b(os.fsencode(name), digest_size=6).digest(), "little") / 2**48


def _existing_folder(root: str | Path | None) -> Path:
    if root is None or str(root) in ("", "???"):
        raise ValueError("data.root is not set: name the folder of images, data.root=<folder>")
    folder = Path(root).expanduser()
    if not folder.exists():
        raise ValueError(f"data.root={root}: no such folder; expected a folder of images")
    if not folder.is_dir():
        raise ValueError(f"data.root={root}: this is a file; expected the folder of images that it lies in")
    return folder

"""Decodes image files: allowed formats, a pixel limit, and tolerance of unreadable metadata."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from io import BytesIO
from typing import TypeVar

from PIL import Image, UnidentifiedImageError, features

from ldm_lab.data.decoding.metadata import with_sound_tags, without_metadata
from ldm_lab.data.transforms import RGB, to_rgb
from ldm_lab.utils.errors import UserError
from ldm_lab.utils.reading import kind_of

with contextlib.suppress(ImportError):  # HEIC photos of phones, if the plugin is installed
    from pillow_heif import register_heif_opener

    register_heif_opener()

T = TypeVar("T")


class NoImageError(UserError):
    """A file has none of `FORMATS`."""


class PixelLimitError(UserError):
    """An image has more pixels than the limit.

    Attributes:
        pixels: number of pixels of the image.
    """

    def __init__(self, pixels: int, limit: int) -> None:
        super().__init__(f"{pixels:,} pixels, more than the {limit:,} that a picture may have")
        self.pixels = pixels


def _formats() -> dict[str, tuple[str, ...]]:
    """Pillow's name of each supported format -> the extensions of its files."""
    found = {
        "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
        "PNG": (".png",),
        "WEBP": (".webp",),
        "BMP": (".bmp",),
        "GIF": (".gif",),
        "TIFF": (".tif", ".tiff"),
    }
    if "avif" in features.modules and features.check_module("avif"):  # in Pillow since 11.3
        found["AVIF"] = (".avif",)
    if features.check_codec("jpg_2000"):
        found["JPEG2000"] = (".jp2", ".j2k", ".jpf", ".jpx", ".jpc", ".j2c")
    if "HEIF" in Image.OPEN:
        found["HEIF"] = (".heic", ".heif", ".hif")
    return found


FORMATS = tuple(_formats())  # Pillow tries no other decoder, whatever a file's name
EXTENSIONS = tuple(ending for endings in _formats().values() for ending in endings)


def decode(content: bytes, background: RGB, max_pixels: int | None = None, mode: str = "RGB") -> Image.Image:
    """Decode an image: upright, 8-bit RGB or "L", in its original size; unreadable metadata are ignored.

    Args:
        content: content of the file.
        background: colour behind transparent images.
        max_pixels: maximum pixels of an image; None: Pillow's limit.
        mode: "RGB", or "L" for grey.

    Raises:
        PixelLimitError, NoImageError, Exception: see `opened`.
    """
    return opened(content, max_pixels, lambda image: to_rgb(image, background, mode))


def opened(content: bytes, max_pixels: int | None, use: Callable[[Image.Image], T]) -> T:
    """`use(image)` of an image that Pillow has opened; if that fails, of the image without its metadata.

    Raises:
        PixelLimitError: the image has more pixels.
        NoImageError: the file has none of `FORMATS`.
        Exception: decoders raise almost anything on corrupt data.
    """
    content = with_sound_tags(content)
    try:
        return _opened(content, max_pixels, use)
    except Exception:
        for less in without_metadata(content):
            with contextlib.suppress(Exception):
                return _opened(less, max_pixels, use)
        raise


def _opened(content: bytes, max_pixels: int | None, use: Callable[[Image.Image], T]) -> T:
    try:
        with limited(max_pixels), Image.open(BytesIO(content), formats=FORMATS) as image:
            if max_pixels and image.width * image.height > max_pixels:
                raise PixelLimitError(image.width * image.height, max_pixels)
            return use(image)
    except UnidentifiedImageError as error:
        raise NoImageError(f"{kind_of(content) or 'not an image'}; expected {', '.join(FORMATS)}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        pixels, limit = map(int, re.findall(r"\d+", str(error))[:2])
        raise PixelLimitError(pixels, max_pixels or limit) from error


@contextlib.contextmanager
def limited(max_pixels: int | None) -> Iterator[None]:
    """Set Pillow's pixel limit, a variable of its module, while one image is decoded."""
    before = Image.MAX_IMAGE_PIXELS
    if max_pixels:
        Image.MAX_IMAGE_PIXELS = max_pixels
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before

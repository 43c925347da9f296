"""Decodes files to arrays without loss: pictures of 8 and 16 bits, TIFF files of any type and pages, `.npy` files."""

from __future__ import annotations

from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

from ldm_lab.data.arrays import FULL, RGB, MismatchError, Samples, fit_channels, full_range, turned
from ldm_lab.data.decoding.metadata import PNG, TIFF
from ldm_lab.data.decoding.pictures import PixelLimitError, decode, opened
from ldm_lab.data.transforms import UPRIGHT, to_8_bit, to_rgb, turn_of
from ldm_lab.utils import png16

NPY = b"\x93NUMPY"
NPY_FILES = (".npy",)
BITS, SAMPLE_FORMAT, ORIENTATION, UNSIGNED = 258, 339, 274, 1  # tags of TIFF, and a value
EXTRA = 'reading it needs tifffile: pip install "ldm_lab[images]"'


def decode_8_bit(content: bytes, mode: str, background: RGB, max_pixels: int | None) -> Image.Image:
    """Decode a picture or a `.npy` file of 8 or 16 bits as 8-bit "RGB" or "L" (see `decode`)."""
    if not content.startswith(NPY):
        return decode(content, background, max_pixels, mode)
    array = fit_channels(_npy(content, max_pixels), len(mode), background, FULL[np.dtype(np.uint8)])
    full_range(array.dtype)  # raises for other types
    if array.dtype == np.uint16:
        array = to_8_bit(array)
    return to_rgb(Image.fromarray(array.squeeze(2) if mode == "L" else array), background, mode)


def decode_samples(content: bytes, channels: int, max_pixels: int | None = None) -> Samples:
    """Decode a file as stored, upright.

    Args:
        content: content of the file.
        channels: wanted channels: the pages of a TIFF file become channels if the first page alone has fewer.
        max_pixels: maximum pixels of an image; None: Pillow's limit.

    Raises:
        MismatchError: the content cannot be used.
        Exception: decoders raise almost anything on corrupt data.
    """
    if content.startswith(NPY):
        return _npy(content, max_pixels)
    if content[:4] in TIFF and not _is_plain(content):
        return _tiff(content, channels, max_pixels)
    return opened(content, max_pixels, lambda image: _picture(image, content))


def _npy(content: bytes, max_pixels: int | None) -> Samples:
    array = np.load(BytesIO(content), allow_pickle=False)
    if array.ndim not in (2, 3) or not array.size:
        raise MismatchError(f"an array of shape {array.shape}; expected (H, W) or (H, W, C)")
    if array.dtype.kind not in "buif":
        raise MismatchError(f"an array of type {array.dtype.name}; expected integers or floats")
    array = array.astype(np.uint8) if array.dtype.kind == "b" else array
    _check_size(array.shape, max_pixels)
    return Samples(array.reshape(*array.shape[:2], -1), colours=False)


def _picture(image: Image.Image, content: bytes) -> Samples:
    """A picture that Pillow has opened."""
    image.load()
    if content.startswith(PNG) and content[24] == 16 and content[25] in (2, 4, 6):  # colour or alpha of 16 bits
        return Samples(turned(_deep_png(image, content), turn_of(image)), colours=True)
    turn = turn_of(image)
    image = image if turn is None else image.transpose(turn)
    if not image.mode.startswith(("I", "F")):
        image = image.convert(_plain_mode(image))
    array = np.asarray(image)
    return Samples(array.reshape(*array.shape[:2], -1), colours=True)


def _plain_mode(image: Image.Image) -> str:
    """L, LA, RGB or RGBA: the mode of 8 bits that keeps all of a picture."""
    grey = image.mode in ("1", "L", "LA", "La")
    return ("L" if grey else "RGB") + ("A" if image.has_transparency_data else "")


def _deep_png(image: Image.Image, content: bytes) -> np.ndarray:
    """A 16-bit PNG as `(H, W, S)` uint16, of which Pillow keeps 8 bits; its transparent colour becomes alpha."""
    array = png16.decode(content)
    key = image.info.get("transparency")
    if key is None or array.shape[2] != 3:
        return array
    alpha = (array != np.array(key, np.uint16)).any(axis=2, keepdims=True) * np.uint16(65535)
    return np.concatenate([array, alpha], axis=2)


def _is_plain(content: bytes) -> bool:
    """Whether Pillow keeps all of a TIFF file: one page, of 8 bits or of 16-bit grey, unsigned."""
    try:
        with Image.open(BytesIO(content), formats=["TIFF"]) as image:
            formats = image.tag_v2.get(SAMPLE_FORMAT, (UNSIGNED,))
            small = max(image.tag_v2.get(BITS, (1,))) <= 8 or image.mode.startswith("I;16")
            return small and image.n_frames == 1 and set(formats) == {UNSIGNED}
    except Exception:  # decoders raise almost anything
        return False


def _tiff(content: bytes, channels: int, max_pixels: int | None) -> Samples:
    """The first page of a TIFF file, or its pages as channels if they then are `channels`."""
    try:
        import tifffile
    except ImportError as error:
        raise MismatchError(EXTRA) from error
    with tifffile.TiffFile(BytesIO(content)) as file:
        pages = list(file.pages)
        first = _page(pages[0], max_pixels)
        samples = first.shape[2]
        if samples == channels or samples * len(pages) != channels:
            return Samples(first, _has_colours(pages[0], samples))
        rest = [_page(page, max_pixels) for page in pages[1:]]
    if any((page.shape, page.dtype) != (first.shape, first.dtype) for page in rest):
        raise MismatchError(f"its {len(pages)} pages differ in size or type, and cannot be the {channels} channels")
    return Samples(np.concatenate([first, *rest], axis=2), colours=False)


def _page(page: Any, max_pixels: int | None) -> np.ndarray:  # noqa: ANN401
    """One page, `(H, W, S)`, upright."""
    planes = page.axes.startswith("S")
    _check_size(page.shape[1:] if planes else page.shape, max_pixels)
    if page.axes not in ("YX", "YXS", "SYX"):
        raise MismatchError(f"a page of axes {page.axes}; expected pages of height and width")
    try:
        array = page.asarray(maxworkers=1)
    except ValueError as error:
        if "imagecodecs" in str(error):
            raise MismatchError(EXTRA.replace("tifffile", "imagecodecs")) from error
        raise
    array = np.moveaxis(array, 0, -1) if planes else array.reshape(*array.shape[:2], -1)
    return turned(array, UPRIGHT.get(page.tags.valueof(ORIENTATION, 1)))


def _has_colours(page: Any, samples: int) -> bool:  # noqa: ANN401
    """Whether a page is grey or RGB, perhaps with alpha as its last sample, and no stack of other channels."""
    alphas = [int(kind) in (1, 2) for kind in page.extrasamples]  # associated or not; 0: anything
    return int(page.photometric) in (1, 2) and samples <= 4 and len(alphas) < 2 and all(alphas)


def _check_size(shape: tuple[int, ...], max_pixels: int | None) -> None:
    limit = max_pixels or 2 * (Image.MAX_IMAGE_PIXELS or 2**62)  # Pillow refuses from twice its limit on
    if shape[0] * shape[1] > limit:
        raise PixelLimitError(shape[0] * shape[1], limit)

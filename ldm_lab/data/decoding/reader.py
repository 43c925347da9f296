"""Turns the content of a file into an image with the channels and the range of a data set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from PIL import Image

from ldm_lab.data.arrays import FULL, RGB, ArrayImage, Samples, extremes, fit_channels, full_range, to_image
from ldm_lab.data.decoding.arrays import decode_8_bit, decode_samples
from ldm_lab.data.value_range import Range
from ldm_lab.utils.pixels import PixelFormat


@dataclass(frozen=True)
class PixelReader:
    """The settings that decide what becomes of a file's values.

    Attributes:
        channels: number of channels.
        value_range: (low, high), "measure", or None: the whole range of a file's integers (see `FolderImages`).
        background: colour behind transparent images of 1 or 3 channels.
        max_pixels: maximum pixels of an image; None: Pillow's limit.
    """

    channels: int
    value_range: Range | Literal["measure"] | None
    background: RGB
    max_pixels: int | None

    @property
    def is_plain(self) -> bool:
        """Whether every image becomes 8-bit RGB."""
        return self.channels == 3 and self.value_range is None

    def is_8_bit(self, pixels: PixelFormat) -> bool:
        """Whether images of this format are pictures of Pillow, RGB or grey, which are resized in 8 bits."""
        return self.is_plain or (self.channels == 1 and self.value_range is None and pixels.is_8_bit)

    def image(self, content: bytes, pixels: PixelFormat) -> Image.Image | ArrayImage:
        """The image in a file; raises what decoders raise, and `MismatchError`."""
        if self.is_8_bit(pixels):
            return decode_8_bit(content, "RGB" if self.channels == 3 else "L", self.background, self.max_pixels)
        return to_image(self._samples(content), pixels, self.background, full=self.value_range is None)

    def full_range(self, content: bytes) -> Range:
        """Range of the integers of a file."""
        return full_range(self._samples(content).array.dtype)

    def extremes(self, content: bytes) -> Range:
        """The smallest and the largest value in a file."""
        samples = self._samples(content)
        behind = FULL.get(samples.array.dtype.newbyteorder("="), (0.0, 1.0))  # range of the background
        return extremes(fit_channels(samples, self.channels, self.background, behind))

    def _samples(self, content: bytes) -> Samples:
        return decode_samples(content, self.channels, self.max_pixels)

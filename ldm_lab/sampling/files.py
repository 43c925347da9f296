"""Files of samples: PNG with 8 or 16 bits for one channel or three, `.npy` in the data's own units for others."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm_lab.utils import png16
from ldm_lab.utils.errors import UserError
from ldm_lab.utils.images import grid, save_png, tile
from ldm_lab.utils.pixels import PixelFormat
from ldm_lab.utils.terminal import say
from ldm_lab.utils.writing import replacing

PNG_CHANNELS = (1, 3)
PNG_END = b"\0\0\0\0IEND\xae\x42\x60\x82"  # last chunk of every PNG, with its CRC
SUFFIXES = (".png", ".npy")
GRID_IMAGES = 64


@dataclass(frozen=True)
class SampleFiles:
    """The files of samples; the manifest records these settings.

    A PNG maps `value_range` to its full depth: with 16 bits, low is 0 and high 65535. An `.npy` holds `(H, W, C)`,
    float32, in the data's own units.

    Attributes:
        channels: channels of the images.
        value_range: the data's values that are -1 and 1 in the networks.
        bit_depth: 8 or 16 of a PNG; 32 of an `.npy`.
    """

    channels: int = 3
    value_range: Sequence[float] = (0.0, 255.0)
    bit_depth: int = 8

    @classmethod
    def of(cls, pixels: PixelFormat, bit_depth: int = 8) -> SampleFiles:
        """The files of images of a format. Raises `UserError` for 16 bits of images that no PNG can hold."""
        if pixels.channels in PNG_CHANNELS:
            return cls(pixels.channels, pixels.value_range, bit_depth)
        if bit_depth != 8:
            what = f"images of {pixels.channels} channels become .npy files of 32-bit floats"
            raise UserError(f"bit_depth={bit_depth}: is for PNG files, and {what}: leave bit_depth out")
        return cls(pixels.channels, pixels.value_range, 32)

    @classmethod
    def deepest(cls, pixels: PixelFormat) -> SampleFiles:
        """The files that round no image: 8 bits for images of 8 bits only."""
        return cls.of(pixels, 16 if pixels.channels in PNG_CHANNELS and not pixels.is_8_bit else 8)

    @property
    def stored_range(self) -> tuple[float, float] | None:
        """The values in the files that are -1 and 1 in the networks; None: those of 8-bit pictures."""
        return {8: None, 16: (0.0, 65535.0)}.get(self.bit_depth, tuple(self.value_range))

    @property
    def pixels(self) -> PixelFormat:
        """Channels and range of the images."""
        return PixelFormat(self.channels, tuple(self.value_range))

    @property
    def suffix(self) -> str:
        """Extension of the files."""
        return ".npy" if self.bit_depth == 32 else ".png"

    def path(self, folder: Path, index: int) -> Path:
        """The file of sample `index`, in a subfolder that holds only samples, as evaluators expect."""
        return folder / "images" / f"{index:06d}{self.suffix}"

    def missing(self, folder: Path, num_samples: int) -> list[int]:
        """The indices whose files are missing or incomplete."""
        is_whole = _is_whole_array if self.suffix == ".npy" else _is_whole_png
        return [index for index in range(num_samples) if not is_whole(self.path(folder, index))]

    def write(self, images: Mapping[Path, np.ndarray]) -> None:
        """Write images `(H, W, C)`, float32 in [0, 1], atomically, on all cores."""
        with ThreadPoolExecutor() as threads:
            list(threads.map(self._write, images, images.values()))

    def _write(self, path: Path, image: np.ndarray) -> None:
        with replacing(path) as temporary, open(temporary, "wb") as file:
            if self.suffix == ".png":
                file.write(png16.encode((image * 65535).round().astype(np.uint16)))
            else:
                values = self.pixels.denormalize(torch.from_numpy(image).double() * 2 - 1)
                np.lib.format.write_array(file, values.numpy(), allow_pickle=False)

    def read(self, path: Path) -> Tensor:
        """A sample: `(C, H, W)`, uint8 of a PNG with 8 bits, else float32 in [-1, 1]."""
        if self.bit_depth == 8:
            with Image.open(path, formats=["PNG"]) as image:
                found = np.array(image.convert("RGB" if self.channels == 3 else "L"))
            return torch.from_numpy(found.reshape(*found.shape[:2], -1)).permute(2, 0, 1)  # (H, W, C) -> (C, H, W)
        if self.bit_depth == 16:
            found = torch.from_numpy(png16.read(path).astype(np.float64) / 65535) * 2 - 1
            return found.float().permute(2, 0, 1)
        return self.pixels.normalize(torch.from_numpy(np.load(path, allow_pickle=False))).permute(2, 0, 1)

    def tile(self, path: Path, preview: Sequence[int] | None = None) -> np.ndarray:
        """A sample as 8-bit RGB, `(H, W, 3)`; for `preview` see `as_rgb`."""
        return tile(self.read(path), preview)


RGB_PNG = SampleFiles()


def _is_whole_png(path: Path) -> bool:
    """Whether a PNG is complete. This package writes complete files, but a copied file may be truncated."""
    try:
        with open(path, "rb") as file:
            file.seek(-len(PNG_END), os.SEEK_END)
            return file.read() == PNG_END
    except OSError:
        return False


def _is_whole_array(path: Path) -> bool:
    """Whether an `.npy` file is as long as its header says."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False).ndim == 3  # mapping needs all bytes
    except (OSError, ValueError, EOFError):
        return False


def collect(
    folder: Path, num_samples: int, files: SampleFiles = RGB_PNG, preview: Sequence[int] | None = None
) -> list[str]:
    """Write `grid.png` of the first images, and of RGB `samples.npz` for the ADM evaluator; returns their names.

    Args:
        folder: folder of the samples.
        num_samples: their number.
        files: kind of their files.
        preview: channels to show in the grid (see `as_rgb`).
    """
    if not num_samples:
        return []
    paths = [files.path(folder, index) for index in range(num_samples)]
    tiles = [files.tile(path, preview) for path in paths[:GRID_IMAGES]]
    save_png(grid(tiles), folder / "grid.png")
    if files.channels != 3:
        say(f"no samples.npz: the ADM evaluator reads RGB, and these images have {files.channels} channel(s)")
        return ["grid.png"]
    write_npz(folder / "samples.npz", paths, files)
    return ["grid.png", "samples.npz"]


def write_npz(target: Path, paths: list[Path], files: SampleFiles) -> None:
    """Write `arr_0`, `(N, H, W, 3)` uint8, image by image, so that 50,000 images need not fit in memory."""
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(paths), *files.tile(paths[0]).shape)}
    with (
        replacing(target) as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as member,
    ):
        np.lib.format.write_array_header_2_0(member, header)
        for path in paths:
            member.write(files.tile(path).tobytes())

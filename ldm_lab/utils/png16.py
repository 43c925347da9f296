"""PNG files of 16 bits a channel, grey or RGB, which Pillow writes with 8 (W3C PNG, third edition, 2025)."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import torch

from ldm_lab.utils.errors import first_line
from ldm_lab.utils.reading import LoadError

SIGNATURE = b"\x89PNG\r\n\x1a\n"
COLOUR_TYPES = {1: 0, 3: 2}  # channels -> colour type
HEADER = struct.Struct(">IIBBBBB")  # width, height, bits, colour type, compression, filter, interlace
UP = 2  # the filter that stores each byte's difference from the byte above


def encode(image: np.ndarray) -> bytes:
    """`(H, W, 1)` or `(H, W, 3)`, uint16 -> the content of a PNG file."""
    height, width, channels = image.shape
    rows = np.ascontiguousarray(image, dtype=">u2").view(np.uint8).reshape(height, -1)
    differences = np.diff(rows, axis=0, prepend=np.zeros_like(rows[:1]))  # modulo 256
    filtered = np.hstack([np.full((height, 1), UP, np.uint8), differences])
    header = HEADER.pack(width, height, 16, COLOUR_TYPES[channels], 0, 0, 0)
    chunks = {b"IHDR": header, b"IDAT": zlib.compress(filtered.tobytes()), b"IEND": b""}
    return SIGNATURE + b"".join(_chunk(name, content) for name, content in chunks.items())


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def decode(content: bytes) -> np.ndarray:
    """The content of a PNG file -> `(H, W, C)`, uint8 or uint16. Raises `RuntimeError` or `ValueError` otherwise."""
    from torchvision.io import decode_png  # importing it takes a second

    pixels = decode_png(torch.frombuffer(bytearray(content), dtype=torch.uint8))
    return pixels.permute(1, 2, 0).numpy()  # (C, H, W) -> (H, W, C)


def read(path: Path) -> np.ndarray:
    """Read a PNG file with 16 bits: `(H, W, C)`, uint16. Raises `LoadError` for any other file."""
    try:
        pixels = decode(path.read_bytes())
    except (OSError, RuntimeError, ValueError) as error:
        raise LoadError(f"{path}: not a PNG file that can be read: {first_line(error)}") from error
    if pixels.dtype != np.uint16:
        raise LoadError(f"{path}: a PNG file with 8 bits, not 16")
    return pixels

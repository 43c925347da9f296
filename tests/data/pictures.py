"""Pictures with known colours in known corners, and how a folder data set sees them; fields of any depth."""

import random
import struct
import zlib

import numpy as np
from PIL import Image

from ldm_lab.data.drawn import draw_field
from ldm_lab.data.images import FolderImages
from ldm_lab.utils.pixels import PixelFormat

RED, GREEN, BLUE, YELLOW = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)
CORNERS = [RED, GREEN, BLUE, YELLOW]  # top left, top right, bottom left, bottom right


def save(path, color=RED, size=(8, 8), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path, **options)
    return path


def four_corners(width=48, height=32):
    image = Image.new("RGB", (width, height), RED)
    image.paste(GREEN, (width // 2, 0, width, height // 2))
    image.paste(BLUE, (0, height // 2, width // 2, height))
    image.paste(YELLOW, (width // 2, height // 2, width, height))
    return image


def corners(pixels):
    """The colours of four points well within the quarters of `(H, W, 3)` pixels."""
    height, width = len(pixels), len(pixels[0])
    points = [(y, x) for y in (height // 4, height * 3 // 4) for x in (width // 4, width * 3 // 4)]
    return [tuple(int(value) for value in pixels[y][x]) for y, x in points]


def assert_four_corners(pixels, tolerance=0, colors=CORNERS):
    difference = np.abs(np.array(corners(pixels)) - np.array(colors)).max()
    assert difference <= tolerance, f"{corners(pixels)}, not {colors}"


def read(path, **arguments):
    """The pixels that a folder data set makes of one file, (H, W, 3)."""
    other = save(path.parent / "other.bmp")
    sets = [FolderImages(path.parent, split, image_size=8, **arguments) for split in ("train", "val")]
    found = {images.path(i): images.read(i) for images in sets for i in range(len(images))}
    assert set(found) == {path, other}
    assert found[path].mode == "RGB"
    return np.asarray(found[path])


MICROSCOPY = PixelFormat(1, (0, 65535))  # grey, 16 bits
FIVE_CHANNELS = PixelFormat(5, (-3, 900))


def field(pixels, index=0, size=(24, 36)):
    """Drawn field `index`, `(H, W, C)`: uint16 of a range of 16 bits, else float32."""
    values = draw_field(random.Random(f"field/{index}"), pixels, *size)
    return values.round().astype(np.uint16) if pixels == MICROSCOPY else values.astype(np.float32)


def save_fields(folder, pixels, count=12, size=(24, 36)):
    """`count` drawn fields as files: 16-bit grey PNG, else `.npy`; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        values = field(pixels, index, size)
        if pixels == MICROSCOPY:
            Image.fromarray(values[..., 0]).save(folder / f"{index:03}.png")
        else:
            np.save(folder / f"{index:03}.npy", values)
    return folder


def deep_png(path, values, extra=b""):
    """`(H, W, S)` uint16 as a 16-bit PNG of grey, grey and alpha, RGB, or RGBA: Pillow writes only grey ones."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, samples = values.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[samples], 0, 0, 0)
    rows = zlib.compress(b"".join(b"\0" + row.astype(">u2").tobytes() for row in values))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", rows) + chunk(b"IEND", b""))

"""Pictures with known colours in known corners, and how a folder data set sees them."""

import numpy as np
from PIL import Image

from ldm_lab.data.images import FolderImages

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

"""What becomes of pictures of every kind: known colours in known corners."""

import os
import struct

import numpy as np
import pytest
from PIL import Image, ImageCms

from ldm_lab.data.decoding import pictures
from ldm_lab.data.decoding.pictures import EXTENSIONS
from ldm_lab.data.images import FolderImages, ImageError
from tests.data.pictures import (
    BLUE,
    CORNERS,
    GREEN,
    RED,
    YELLOW,
    assert_four_corners,
    deep_png,
    four_corners,
    read,
    save,
)

WHITE = (255, 255, 255)
LOSSLESS = {
    "webp": {"lossless": True},
    "jpg": {"quality": 100, "subsampling": 0},
    "avif": {"quality": 100, "subsampling": "4:4:4"},
}
TYPES = ("jpg", "JPEG", "jfif", "jpe", "png", "webp", "bmp", "gif", "tif", "TIFF", "avif", "jp2")

# What a viewer does for an EXIF orientation, undone.
STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


# --- types of file


@pytest.mark.parametrize("suffix", TYPES)
def test_every_type(tmp_path, suffix):
    if f".{suffix.lower()}" not in EXTENSIONS:
        pytest.skip("this Pillow does not read it")
    four_corners().save(tmp_path / f"x.{suffix}", **LOSSLESS.get(suffix, {}))
    pixels = read(tmp_path / f"x.{suffix}")
    assert pixels.shape == (32, 48, 3)
    assert_four_corners(pixels, tolerance=3)


def test_what_pillow_does_not_read_here_is_no_image(monkeypatch):
    monkeypatch.setattr(pictures.features, "check_module", lambda name: False)
    monkeypatch.setattr(pictures.features, "check_codec", lambda name: False)
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    assert not {"AVIF", "JPEG2000", "HEIF"} & set(pictures._formats())
    monkeypatch.setitem(Image.OPEN, "HEIF", None)  # as a plugin registers it
    assert ".heic" in pictures._formats()["HEIF"]


@pytest.mark.parametrize("content", ["JPEG", "WEBP", "PNG"])
def test_the_content_decides_not_the_name(tmp_path, content):
    folder = tmp_path / "0" / "a"  # as LSUN is exported: .webp in nested folders
    folder.mkdir(parents=True)
    four_corners().save(folder / "0a1b2c.webp", format=content, quality=95)
    assert_four_corners(read(folder / "0a1b2c.webp"), tolerance=12)


@pytest.mark.parametrize("content", ["PPM", "ICNS", "TGA"])
def test_other_decoders_are_never_asked(tmp_path, content):
    four_corners(64, 64).save(tmp_path / "x.png", format=content)
    with pytest.raises(ImageError, match=r"not an image; expected JPEG, PNG, WEBP, BMP, GIF, TIFF\b"):
        read(tmp_path / "x.png")


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_of_an_animation_the_first_frame(tmp_path, suffix):
    first = four_corners()
    others = [first.transpose(Image.Transpose.ROTATE_180), Image.new("RGB", first.size, "white")]
    first.save(tmp_path / f"x.{suffix}", save_all=True, append_images=others, duration=50)
    with Image.open(tmp_path / f"x.{suffix}") as image:
        assert image.n_frames == 3
    assert_four_corners(read(tmp_path / f"x.{suffix}"), tolerance=12)


def test_a_first_frame_that_does_not_fill_its_canvas(tmp_path):
    Image.new("RGB", (4, 4), RED).save(tmp_path / "x.gif")
    gif = bytearray((tmp_path / "x.gif").read_bytes())
    gif[6:10] = struct.pack("<HH", 8, 8)  # the canvas
    descriptor = gif.index(b"\x2c\0\0\0\0")
    gif[descriptor + 1 : descriptor + 5] = struct.pack("<HH", 4, 4)  # the place of the frame on it
    (tmp_path / "x.gif").write_bytes(gif)
    pixels = read(tmp_path / "x.gif")
    assert pixels.shape == (8, 8, 3)
    assert pixels[6, 6].tolist() == [255, 0, 0]


@pytest.mark.parametrize(("suffix", "content"), [("tif", "TIFF"), ("jpg", "MPO")])
def test_of_several_pictures_the_first(tmp_path, suffix, content):
    """Pages of a TIFF; a depth map or the like in the JPEG file of a phone."""
    path = tmp_path / f"x.{suffix}"
    four_corners().save(path, format=content, save_all=True, append_images=[Image.new("RGB", (9, 9))], quality=95)
    assert_four_corners(read(path), tolerance=12)


# --- kinds of colour


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "tif", "webp", "gif"])
def test_grey(tmp_path, suffix):
    levels = np.repeat(np.repeat(np.array([[0, 80], [160, 255]], np.uint8), 16, 0), 24, 1)
    Image.fromarray(levels).save(tmp_path / f"x.{suffix}", **LOSSLESS.get(suffix, {}))
    assert_four_corners(read(tmp_path / f"x.{suffix}"), 2, [(v, v, v) for v in (0, 80, 160, 255)])


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif"])
def test_black_and_white(tmp_path, suffix):
    Image.fromarray(np.array([[True, False]])).save(tmp_path / f"bits.{suffix}")
    assert read(tmp_path / f"bits.{suffix}").tolist() == [[[255] * 3, [0] * 3]]


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_grey_with_alpha(tmp_path, suffix):
    Image.fromarray(np.array([[[10, 255], [10, 0]]], np.uint8), "LA").save(tmp_path / f"x.{suffix}")
    assert read(tmp_path / f"x.{suffix}").tolist() == [[[10] * 3, [255] * 3]]


@pytest.mark.parametrize("suffix", ["png", "webp", "tif"])
def test_transparency_shows_the_background(tmp_path, suffix):
    rgba = np.zeros((4, 3, 4), np.uint8)
    rgba[0], rgba[1], rgba[2:] = (255, 0, 0, 255), (255, 0, 0, 128), (255, 0, 0, 0)
    Image.fromarray(rgba).save(tmp_path / f"clear.{suffix}", lossless=True)
    expected = np.array([[255, 0, 0], [255, 127, 127], [255, 255, 255], [255, 255, 255]])
    assert abs(read(tmp_path / f"clear.{suffix}")[:, 0].astype(int) - expected).max() <= 1
    on_green = read(tmp_path / f"clear.{suffix}", background="#00ff00")
    assert tuple(on_green[3, 0]) == GREEN


@pytest.mark.parametrize("suffix", ["png", "bmp", "gif", "tif"])
def test_palette(tmp_path, suffix):
    four_corners().quantize(4).save(tmp_path / f"x.{suffix}")
    with Image.open(tmp_path / f"x.{suffix}") as image:
        assert image.mode == "P"
    assert_four_corners(read(tmp_path / f"x.{suffix}"))


@pytest.mark.parametrize("transparency", [1, bytes([255, 0, 128])])
def test_palette_with_transparency(tmp_path, transparency):
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    image.putpalette([*RED, *GREEN, *BLUE])
    image.save(tmp_path / "palette.png", transparency=transparency)
    last = [0, 0, 255] if transparency == 1 else [127, 127, 255]
    assert read(tmp_path / "palette.png").tolist() == [[[255, 0, 0], [255, 255, 255], last]]


def test_transparent_gif(tmp_path):
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    image.putpalette([*RED, *GREEN, *BLUE])
    image.save(tmp_path / "x.gif", transparency=1)
    assert read(tmp_path / "x.gif").tolist() == [[[255, 0, 0], [255, 255, 255], [0, 0, 255]]]


def test_one_transparent_colour_without_alpha_channel(tmp_path):
    image = Image.new("RGB", (2, 1), RED)
    image.putpixel((1, 0), BLUE)
    image.save(tmp_path / "keyed.png", transparency=BLUE)
    assert read(tmp_path / "keyed.png").tolist() == [[[255, 0, 0], [255, 255, 255]]]


@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_cmyk(tmp_path, suffix):
    four_corners().convert("CMYK").save(tmp_path / f"print.{suffix}", **LOSSLESS.get(suffix, {}))
    assert_four_corners(read(tmp_path / f"print.{suffix}"), tolerance=4)


@pytest.mark.parametrize("transform", [0, 2])
def test_cmyk_as_photoshop_writes_it(tmp_path, transform):
    """JPEG files with an APP14 marker hold 255 - ink; with transform 2, the inks as YCbCr."""
    picture = np.asarray(four_corners())
    inks = Image.fromarray(255 - picture)  # cyan, magenta, yellow; no black
    held = inks.convert("YCbCr") if transform else Image.fromarray(picture)
    bands = [band.point(lambda value: 255 - value) for band in held.split()]  # Pillow inverts what it writes
    Image.merge("CMYK", [*bands, Image.new("L", held.size)]).save(tmp_path / "x.jpg", quality=100)
    data = bytearray((tmp_path / "x.jpg").read_bytes())
    data[data.index(b"Adobe") + 11] = transform  # the last byte of APP14
    (tmp_path / "x.jpg").write_bytes(data)
    assert_four_corners(read(tmp_path / "x.jpg"), tolerance=4)


def test_lab(tmp_path):
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    lab = ImageCms.applyTransform(four_corners(), ImageCms.buildTransform(*profiles, "RGB", "LAB"))
    lab.save(tmp_path / "x.tif")
    assert_four_corners(read(tmp_path / "x.tif"), tolerance=30)  # the brightest colours lie outside of 8-bit LAB


@pytest.mark.parametrize("compression", ["jpeg", "tiff_lzw", "tiff_adobe_deflate"])
def test_compressed_tiff(tmp_path, compression):
    four_corners().save(tmp_path / "x.tif", compression=compression)
    assert_four_corners(read(tmp_path / "x.tif"), tolerance=12)


# --- more than eight bits


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_sixteen_bit_grey_keeps_its_range(tmp_path, suffix, order):
    levels = np.array([[0, 257, 32768, 65535]], order)
    Image.frombytes("I;16" if order == "<u2" else "I;16B", (4, 1), levels.tobytes()).save(tmp_path / f"deep.{suffix}")
    assert read(tmp_path / f"deep.{suffix}")[0, :, 0].tolist() == [0, 1, 128, 255]


def test_sixteen_bit_grey_is_turned_too(tmp_path):
    levels = np.array([[0, 65535]], np.uint16)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(levels).save(tmp_path / "deep.png", exif=exif)
    assert read(tmp_path / "deep.png")[:, :, 0].tolist() == [[0], [255]]


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        ([65535, 32896, 0], [255, 128, 0]),
        ([65535, 32896, 0, 65535], [255, 128, 0]),
        ([65535, 32896, 0, 0], [255, 255, 255]),
        ([32896, 65535], [128, 128, 128]),
        ([32896, 0], [255, 255, 255]),
    ],
)
def test_sixteen_bit_colour_and_transparency(tmp_path, samples, expected):
    deep_png(tmp_path / "deep.png", np.array(samples, np.uint16)[None, None])
    assert read(tmp_path / "deep.png").tolist() == [[expected]]


def test_sixteen_bit_colour_tiff(tmp_path):
    pixels = struct.pack("<3H", 65535, 32896, 0)
    tags = [
        (256, 3, 1, 1), (257, 3, 1, 1), (258, 3, 3, 0), (259, 3, 1, 1), (262, 3, 1, 2),
        (273, 4, 1, 0), (277, 3, 1, 3), (278, 3, 1, 1), (279, 4, 1, len(pixels)),
    ]  # fmt: skip
    bits = 8 + 2 + 12 * len(tags) + 4
    values = {258: bits, 273: bits + 6}  # bits per sample, and the pixels, follow the directory
    entries = b"".join(struct.pack("<HHII", tag, kind, n, values.get(tag, value)) for tag, kind, n, value in tags)
    directory = struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)
    (tmp_path / "x.tif").write_bytes(
        b"II*\0" + struct.pack("<I", 8) + directory + struct.pack("<3H", 16, 16, 16) + pixels
    )
    assert read(tmp_path / "x.tif").tolist() == [[[255, 128, 0]]]


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_numbers_without_a_known_white_are_refused(tmp_path, kind):
    Image.fromarray(np.ones((4, 4), kind)).save(tmp_path / "x.tif")
    with pytest.raises(ImageError, match=r"x\.tif: cannot be read: floats or 32-bit .* 8 or 16 bits$"):
        read(tmp_path / "x.tif")


# --- the way up, and the size


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation(tmp_path, orientation, suffix):
    image, change = four_corners(), STORED[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = image if change is None else image.transpose(change)
    stored.save(tmp_path / f"photo.{suffix}", exif=exif, **LOSSLESS.get(suffix, {}))
    pixels = read(tmp_path / f"photo.{suffix}")
    assert pixels.shape == (32, 48, 3)
    assert_four_corners(pixels, tolerance=3)


def item(folder, picture, image_size):
    """The tensor made of `picture`, as pixels (H, W, 3) in 0..255."""
    picture.save(folder / "x.png")
    picture.save(folder / "y.png")
    tensor = FolderImages(folder, "train", image_size)[0]["image"]  # (3, H, W)
    assert (tensor.shape[0], tensor.min() >= -1, tensor.max() <= 1) == (3, True, True)
    return ((tensor + 1) * 127.5).round().int().permute(1, 2, 0).tolist()


@pytest.mark.parametrize("picture", [(48, 32), (32, 48), (12, 12), (300, 200)], ids=str)
@pytest.mark.parametrize("image_size", [16, [16, 24], [40, 16], 64], ids=str)
def test_any_size_to_any_size(tmp_path, picture, image_size):
    pixels = item(tmp_path, four_corners(*picture), image_size)
    height, width = image_size if isinstance(image_size, list) else (image_size, image_size)
    assert (len(pixels), len(pixels[0])) == (height, width)
    assert_four_corners(pixels, tolerance=20)  # bicubic overshoots a little beside an edge


def test_the_crop_is_the_middle(tmp_path):
    thirds = Image.new("RGB", (90, 30), RED)
    thirds.paste(YELLOW, (30, 0, 60, 30))
    thirds.paste(BLUE, (60, 0, 90, 30))
    assert_four_corners(item(tmp_path, thirds, 30), colors=[YELLOW] * 4)
    assert_four_corners(item(tmp_path, thirds, [30, 90]), colors=[RED, BLUE, RED, BLUE])


def test_enlarging_is_smooth(tmp_path):
    ramp = np.arange(8, dtype=np.uint8) * 32
    values = np.array(item(tmp_path, Image.fromarray(ramp[None].repeat(8, 0)), 64))[32, :, 0]
    between = ((np.arange(64) + 0.5) / 8 - 0.5) * 32  # bicubic interpolation keeps straight lines
    assert np.abs(values - between)[16:-16].max() <= 1


# --- names and rights


def test_unicode_names(tmp_path):
    path = tmp_path / "фото 猫 🙂 x" / "é'\"#%?*.PNG"
    path.parent.mkdir()
    four_corners().save(path)
    assert_four_corners(read(path))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="may read everything")
def test_a_file_that_may_not_be_read(tmp_path):
    path = save(tmp_path / "x.png")
    path.chmod(0)
    with pytest.raises(ImageError, match=r"x\.png: cannot be read: Permission denied$"):
        read(path)


def test_a_file_that_is_gone(tmp_path):
    for n in range(3):
        save(tmp_path / f"{n}.png")
    images = FolderImages(tmp_path, "train", 8)
    images.path(0).unlink()
    with pytest.raises(ImageError, match=r"\.png: cannot be read: No such file or directory$"):
        images.read(0)


def test_the_corners_are_told_apart():
    """The oracle of this file: each change to a picture shows in its corners."""
    image = four_corners()
    assert_four_corners(np.asarray(image))
    for change in Image.Transpose:
        with pytest.raises(AssertionError):
            assert_four_corners(np.asarray(image.transpose(change)), tolerance=100)
    with pytest.raises(AssertionError):
        assert_four_corners(np.asarray(image)[..., ::-1], tolerance=100)
    assert len(set(CORNERS)) == 4

"""Sound pictures whose metadata are broken: pixels and, where it can be read, the way up; and what stays refused."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile, PngImagePlugin

from ldm_lab.data.decoding.pictures import FORMATS, decode
from ldm_lab.data.images import ImageError
from tests.data.pictures import assert_four_corners, four_corners, read
from tests.security.guard import guarded

WHITE = (255, 255, 255)
GARBAGE = b"Exif\0\0no EXIF data at all "
STORED = four_corners().transpose(Image.Transpose.ROTATE_90)  # orientation 6 turns it back


def exif(orientation=6):
    made = Image.Exif()
    made[0x0112], made[0x010F] = orientation, "a maker of cameras"
    return made.tobytes()


def saved(kind, picture=None, **options):
    buffer = io.BytesIO()
    (picture or four_corners()).save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(name, data, checksum=None):
    """Of a PNG."""
    checksum = zlib.crc32(name + data) if checksum is None else checksum
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", checksum)


def behind_header(png, chunks):
    return png[:33] + chunks + png[33:]


LARGE = zlib.compress(bytes(3 * 2**20))
PNG = saved("PNG")
BROKEN = {
    "zTXt of 3 MB": chunk(b"zTXt", b"parameters\0\0" + LARGE),
    "iTXt of 3 MB": chunk(b"iTXt", b"parameters\0\1\0\0\0" + LARGE),
    "iCCP of 3 MB": chunk(b"iCCP", b"profile\0\0" + LARGE),
    "iCCP of no known packing": chunk(b"iCCP", b"profile\0\7" + LARGE),
    "iCCP without an end": chunk(b"iCCP", b"profile"),
    "tEXt of 70 MB in all": chunk(b"tEXt", b"key\0" + b"x" * 2**20) * 70,
    "tEXt, checksum": chunk(b"tEXt", b"key\0text", checksum=7),
    "gAMA, checksum": chunk(b"gAMA", struct.pack(">I", 45455), checksum=7),
    "pHYs, cut short": chunk(b"pHYs", b"\0\0"),
    "sRGB, empty": chunk(b"sRGB", b""),
    "private, checksum": chunk(b"prVt", b"mine", checksum=7),
    "frames out of order": chunk(b"acTL", struct.pack(">II", 2, 0)) + chunk(b"fcTL", struct.pack(">I22x", 9)),
}
BROKEN_EXIF = {"garbage": chunk(b"eXIf", GARBAGE), "checksum": chunk(b"eXIf", exif()[6:], checksum=7)}


@pytest.mark.parametrize("broken", {**BROKEN, **BROKEN_EXIF}.values(), ids={**BROKEN, **BROKEN_EXIF})
def test_png(tmp_path, broken):
    (tmp_path / "x.png").write_bytes(behind_header(PNG, broken))
    assert_four_corners(read(tmp_path / "x.png"))


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_the_way_up_is_read_beside_what_cannot_be(broken):
    content = behind_header(saved("PNG", STORED), chunk(b"eXIf", exif()[6:]) + broken)
    assert_four_corners(np.asarray(decode(content, WHITE)))


def test_text_behind_the_pixels_and_a_file_cut_short_in_it():
    content = PNG[:-12] + chunk(b"zTXt", b"key\0\0" + LARGE) + PNG[-12:]
    for length in (len(content), len(content) - 100):
        assert_four_corners(np.asarray(decode(content[:length], WHITE)))


def test_transparency_stays_beside_what_is_broken():
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([255, 0, 0, 0, 255, 0])
    content = behind_header(saved("PNG", palette, transparency=1), BROKEN["tEXt, checksum"])
    assert np.asarray(decode(content, WHITE)).tolist() == [[[255, 0, 0], [255, 255, 255]]]


def with_segment(jpeg, marker, data):
    """An application segment, where that of JFIF stands in others."""
    return jpeg[:2] + struct.pack(">BBH", 0xFF, marker, 2 + len(data)) + data + jpeg[2:]


SEGMENTS = {
    "Photoshop's, cut short": (0xED, b"Photoshop 3.0\0" + b"8BIM\x04\x04"),
    "a profile's, cut short": (0xE2, b"ICC_PROFILE\0"),
    "JFIF's, cut short": (0xE0, b"JFIF\0"),
    "several pictures', garbage": (0xE2, b"MPF\0" + GARBAGE),
}


@pytest.mark.parametrize(("marker", "data"), SEGMENTS.values(), ids=SEGMENTS)
@pytest.mark.parametrize("turned", [False, True])
def test_jpeg(marker, data, turned):
    picture, options = (STORED, {"exif": exif()}) if turned else (None, {})
    content = with_segment(saved("JPEG", picture, quality=100, subsampling=0, **options), marker, data)
    assert_four_corners(np.asarray(decode(content, WHITE)), tolerance=3)


@pytest.mark.filterwarnings("ignore:Image appears to be a malformed MPO")
def test_a_jpeg_keeps_what_tells_its_colours():
    """Adobe's segment says that these four are inks, and inverted."""
    content = saved("JPEG", four_corners().convert("CMYK"), quality=100, subsampling=0)
    for marker, data in SEGMENTS.values():
        assert_four_corners(np.asarray(decode(with_segment(content, marker, data), WHITE)), tolerance=4)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "PNG"])
def test_exif_data_that_cannot_be_read_turn_nothing(kind):
    assert_four_corners(np.asarray(decode(saved(kind, exif=GARBAGE), WHITE)), tolerance=25)


@pytest.mark.skipif("AVIF" not in FORMATS, reason="this Pillow reads no AVIF")
@pytest.mark.parametrize("orientation", [1, 6])
def test_avif(orientation):
    """Which way is up stands twice in such a file: the second place is not touched."""
    content = bytearray(saved("AVIF", STORED if orientation == 6 else None, exif=exif(orientation), quality=95))
    start, end = (content.index(word) for word in (b"MM\0*", b"a maker of cameras"))
    content[start:end] = bytes(end - start)
    assert_four_corners(np.asarray(decode(bytes(content), WHITE)), tolerance=25)


def entries(tiff):
    """The places of the directory's entries, by tag."""
    (start,) = struct.unpack_from("<I", tiff, 4)
    (count,) = struct.unpack_from("<H", tiff, start)
    places = range(start + 2, start + 2 + 12 * count, 12)
    return {struct.unpack_from("<H", tiff, place)[0]: place for place in places}


@pytest.mark.parametrize("tag", [270, 305, 34675])  # description, software, profile
@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_a_tag_of_a_tiff_that_lies_beyond_its_end(tag, compression):
    """Tags behind it say how the pixels are packed, here that the fourth number is transparency."""
    rgba = four_corners().convert("RGBA")
    rgba.putalpha(Image.new("L", rgba.size, 0))
    tiff = bytearray(
        saved("TIFF", rgba, compression=compression, description="a" * 50, software="b" * 50, icc_profile=bytes(200))
    )
    struct.pack_into("<I", tiff, entries(tiff)[tag] + 8, 2**31 - 5)
    assert_four_corners(np.asarray(decode(bytes(tiff), WHITE)), colors=[WHITE] * 4)


# What decides pixels is as strict as ever.


@pytest.mark.parametrize("name", [b"IHDR", b"PLTE", b"tRNS"])
def test_checksums_of_what_decides_pixels(tmp_path, name):
    palette = four_corners().quantize(4)
    png = bytearray(saved("PNG", palette, transparency=0))
    place = png.index(name)
    (length,) = struct.unpack_from(">I", png, place - 4)
    png[place + 4 + length] ^= 1
    (tmp_path / "x.png").write_bytes(png)
    with pytest.raises(ImageError, match=r"x\.png: "):
        read(tmp_path / "x.png")


@pytest.mark.parametrize("broken", ["zTXt of 3 MB", "tEXt, checksum"])
def test_pixels_that_are_cut_short_beside_broken_metadata(tmp_path, broken):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    content = behind_header(saved("PNG", noise), BROKEN[broken])
    (tmp_path / "x.png").write_bytes(content[: len(content) - 5000])
    with pytest.raises(ImageError, match=r"x\.png: "):
        read(tmp_path / "x.png")


def test_pillow_is_left_as_it_was():
    flags = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, PngImagePlugin.MAX_TEXT_CHUNK
    for max_pixels in (None, 10**9, 1):
        try:
            decode(behind_header(PNG, BROKEN["zTXt of 3 MB"]), WHITE, max_pixels)
        except ValueError:
            assert max_pixels == 1
        assert flags == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, PngImagePlugin.MAX_TEXT_CHUNK)


def test_text_that_would_unpack_to_gigabytes_takes_no_memory(tmp_path):
    packer = zlib.compressobj()
    part = packer.compress(bytes(2**24)) + packer.flush(zlib.Z_FULL_FLUSH)
    again = zlib.compressobj(wbits=-15)
    more = again.compress(bytes(2**24)) + again.flush(zlib.Z_FULL_FLUSH)
    content = behind_header(PNG, chunk(b"zTXt", b"key\0\0" + part + more * 255))  # 4 GB
    assert guarded(lambda: decode(content, WHITE).size, tmp_path).text == "(48, 32)"

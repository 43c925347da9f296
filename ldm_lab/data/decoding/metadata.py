"""Strips unreadable metadata from image files, so that Pillow can decode their pixels.

Pillow rejects a whole file for a text over its limits, a wrong checksum or a truncated profile. Texts, profiles, dates
and the like change no pixel here, so they can be dropped; only the EXIF orientation matters.
"""

from __future__ import annotations

import contextlib
import struct
import zlib
from collections.abc import Iterator

PNG, JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
TIFF = {  # start -> byte order; formats of: offset of the first directory, its length, an entry (tag, type, count)
    b"II*\0": ("<", "4xI", "H", "HHI4s"),
    b"MM\0*": (">", "4xI", "H", "HHI4s"),
    b"II+\0": ("<", "8xQ", "Q", "HHQ8s"),
    b"MM\0+": (">", "8xQ", "Q", "HHQ8s"),
}
TIFF_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
TIFF_METADATA = {269, 270, 271, 272, 282, 283, 285, 286, 287, 296, 297, 305, 306, 315, 316, 700}
TIFF_PRIVATE = 2**15  # tags from here on: profiles, EXIF, GPS, IPTC ...


def without_metadata(content: bytes) -> Iterator[bytes]:
    """Versions of the file with less and less metadata; none for formats whose metadata Pillow always reads."""
    if content.startswith(PNG):
        yield _png(content)
    elif content.startswith(JPEG):
        yield _jpeg(content, exif=True)
        yield _jpeg(content, exif=False)
    elif content[:4] in TIFF:
        yield _tiff(content, every=True)
    elif content[4:8] == b"ftyp":
        yield _without_exif_item(content)


def _png(content: bytes) -> bytes:
    """A PNG with only its critical chunks, its transparency, and EXIF data with a valid checksum."""
    parts, place = [content[:8]], 8
    while len(content) - place >= 8:
        length, name = struct.unpack_from(">I4s", content, place)
        chunk = content[place : place + 12 + length]  # length, name, data, checksum
        is_sound = zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")
        if not name[:1].islower() or name == b"tRNS" or (name == b"eXIf" and is_sound):
            parts.append(chunk)
        place += 12 + length
        if name == b"IEND":
            break
    return b"".join(parts)


def _jpeg(content: bytes, exif: bool) -> bytes:
    """A JPEG without comments and application data, except for the segments that define its colours."""
    parts, place = [content[:2]], 2
    while content[place : place + 1] == b"\xff" and len(content) - place >= 4:
        marker, length = struct.unpack_from(">xBH", content, place)
        if marker == 0xDA:  # start of the pixels
            break
        segment = content[place : place + 2 + length]
        kept = {0xE0: length >= 16, 0xEE: length >= 14, 0xE1: exif and segment[4:10] == b"Exif\0\0"}  # JFIF, Adobe
        if not (0xE0 <= marker <= 0xEF or marker == 0xFE) or kept.get(marker):
            parts.append(segment)
        place += 2 + length
    return b"".join([*parts, content[place:]])


def _without_exif_item(content: bytes) -> bytes:
    """An AVIF or HEIC file whose EXIF item has an unknown type; its orientation is stored elsewhere."""
    place = 0
    while len(content) - place >= 8:
        size, name = struct.unpack_from(">I4s", content, place)
        if name == b"meta":
            end = place + size
            return content[:place] + content[place:end].replace(b"Exif", b"none") + content[end:]
        place += max(8, size)
    return content


def with_sound_tags(content: bytes) -> bytes:
    """A TIFF without the metadata tags that point beyond its end; any other file unchanged.

    Pillow stops at the first tag whose value it cannot read and ignores all later tags, which may define the layout of
    the pixels.
    """
    return _tiff(content, every=False) if content[:4] in TIFF else content


def _tiff(content: bytes, every: bool) -> bytes:
    """A TIFF whose metadata tags, all or those that point beyond its end, are replaced by one byte each."""
    order, *formats = TIFF[content[:4]]
    header, number, entry = (struct.Struct(order + form) for form in formats)
    less = bytearray(content)
    with contextlib.suppress(struct.error, OverflowError):  # corrupt directory: left to Pillow
        (place,) = header.unpack_from(content)
        (count,) = number.unpack_from(content, place)
        for start in range(place + number.size, place + number.size + count * entry.size, entry.size):
            tag, kind, items, value = entry.unpack_from(content, start)
            size = items * TIFF_SIZES.get(kind, 1)
            end = int.from_bytes(value, "little" if order == "<" else "big") + size
            unreadable = every or (size > len(value) and end > len(content))
            if unreadable and (tag in TIFF_METADATA or tag >= TIFF_PRIVATE):
                entry.pack_into(less, start, tag, 1, 1, bytes(len(value)))
    return bytes(less)

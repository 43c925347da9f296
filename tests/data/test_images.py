import os
import struct
import traceback
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from ldm_lab.data.images import FolderImages, ImageError, find_images, split_by_hash

RED, BLUE = (255, 0, 0), (0, 0, 255)


def save(path, color=RED, size=(8, 8), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path, **options)
    return path


def read(path, **arguments):
    """The pixels that a folder data set makes of one file, (H, W, 3)."""
    folder = path.parent
    others = [save(folder / f"other{n}.bmp") for n in range(2)]
    sets = [FolderImages(folder, split, image_size=8, **arguments) for split in ("train", "val")]
    found = {images.path(i): np.asarray(images.read(i)) for images in sets for i in range(len(images))}
    assert set(found) == {path, *others}
    return found[path]


# --- what is found, and how it is divided


def test_finds_every_kind_at_every_depth(tmp_path):
    names = ["a.jpg", "b.JPEG", "deep/er/c.PNG", "deep/d.webp", "ünï/çødé 猫.Bmp"]
    for name in names:
        save(tmp_path / name)
    for name in ["notes.txt", "e.jpg.part", ".hidden.png", ".thumbnails/f.png", "deep/._a.jpg"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert sorted(find_images(tmp_path)) == sorted(names)
    sets = [FolderImages(tmp_path, split, image_size=4, val_fraction=0.4) for split in ("train", "val")]
    assert sorted(os.fsdecode(name) for images in sets for name in images.names) == sorted(names)
    assert all(images[i]["image"].shape == (3, 4, 4) for images in sets for i in range(len(images)))


def test_links_are_followed_but_not_in_circles(tmp_path):
    save(tmp_path / "root" / "a.png")
    save(tmp_path / "elsewhere" / "b.png")
    (tmp_path / "root" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root" / "circle").symlink_to(tmp_path / "root")
    (tmp_path / "root" / "broken.png").symlink_to(tmp_path / "nowhere.png")
    assert sorted(find_images(tmp_path / "root")) == ["a.png", "linked/b.png"]


def test_split_does_not_move_when_images_come_or_go():
    names = [f"folder/{n:04d}.jpg" for n in range(400)]
    train, val = split_by_hash(names, 0.1)
    assert sorted(train + val) == names
    assert 20 <= len(val) <= 60
    more_train, more_val = split_by_hash([f"new{n}.png" for n in range(100)] + names, 0.1)
    assert set(train) <= set(more_train)
    assert set(val) <= set(more_val)
    wider = split_by_hash(names, 0.2)[1]
    assert set(val) < set(wider)


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
@pytest.mark.parametrize("count", [2, 3, 10])
def test_neither_part_is_empty(count, fraction):
    train, val = split_by_hash([str(n) for n in range(count)], fraction)
    assert sorted([len(train), len(val)]) == [1, count - 1]
    assert not set(train) & set(val)


def test_fingerprint_follows_the_files(tmp_path):
    for n in range(4):
        save(tmp_path / f"{n}.png")

    def fingerprint():
        return FolderImages(tmp_path, "train", image_size=8).fingerprint()

    before = fingerprint()
    assert fingerprint() == before
    images = FolderImages(tmp_path, "train", image_size=8)
    save(images.path(0), BLUE, size=(31, 17))
    assert fingerprint() != before


# --- what becomes of a picture


def test_exif_rotation_is_applied(tmp_path):
    image = Image.new("RGB", (16, 8), RED)
    image.paste(BLUE, (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: to be turned a quarter clockwise
    image.save(tmp_path / "photo.jpg", exif=exif, quality=100)
    pixels = read(tmp_path / "photo.jpg")
    assert pixels.shape == (16, 8, 3)
    assert pixels[2, 4, 2] > 200  # blue, left before, is at the top
    assert pixels[13, 4, 0] > 200


@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_transparency_shows_the_background(tmp_path, suffix):
    rgba = np.zeros((4, 3, 4), np.uint8)
    rgba[0], rgba[1], rgba[2:] = (255, 0, 0, 255), (255, 0, 0, 128), (255, 0, 0, 0)
    Image.fromarray(rgba).save(tmp_path / f"clear.{suffix}", lossless=True)
    expected = np.array([[255, 0, 0], [255, 127, 127], [255, 255, 255], [255, 255, 255]])
    assert abs(read(tmp_path / f"clear.{suffix}")[:, 0].astype(int) - expected).max() <= 1
    on_green = read(tmp_path / f"clear.{suffix}", background="#00ff00")
    assert tuple(on_green[3, 0]) == (0, 255, 0)


def test_grey_with_alpha(tmp_path):
    Image.fromarray(np.array([[[10, 255], [10, 0]]], np.uint8), "LA").save(tmp_path / "x.png")
    assert read(tmp_path / "x.png").tolist() == [[[10] * 3, [255] * 3]]


@pytest.mark.parametrize("transparency", [1, bytes([255, 0, 128])])
def test_palette_with_transparency(tmp_path, transparency):
    image = Image.new("P", (3, 1))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.putdata([0, 1, 2])
    image.save(tmp_path / "palette.png", transparency=transparency)
    last = [0, 0, 255] if transparency == 1 else [127, 127, 255]
    assert read(tmp_path / "palette.png").tolist() == [[[255, 0, 0], [255, 255, 255], last]]


def test_one_transparent_colour_without_alpha_channel(tmp_path):
    image = Image.new("RGB", (2, 1), RED)
    image.putpixel((1, 0), BLUE)
    image.save(tmp_path / "keyed.png", transparency=BLUE)
    assert read(tmp_path / "keyed.png").tolist() == [[[255, 0, 0], [255, 255, 255]]]


def test_grey_and_black_and_white(tmp_path):
    Image.new("L", (2, 2), 77).save(tmp_path / "grey.bmp")
    assert (read(tmp_path / "grey.bmp") == 77).all()
    (tmp_path / "other").mkdir()
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "other" / "bits.png")
    assert read(tmp_path / "other" / "bits.png").tolist() == [[[255] * 3, [0] * 3]]


def test_cmyk(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "print.jpg", quality=100)
    pixels = read(tmp_path / "print.jpg").astype(int)
    assert pixels.shape == (8, 8, 3)
    assert abs(pixels - RED).max() < 12


def test_sixteen_bit_grey_keeps_its_range(tmp_path):
    levels = np.array([[0, 257, 32768, 65535]], np.uint16)
    Image.fromarray(levels).save(tmp_path / "deep.png")
    assert read(tmp_path / "deep.png")[0, :, 0].tolist() == [0, 1, 128, 255]


def test_sixteen_bit_colour(tmp_path):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)  # 1x1 pixel, 16 bits, RGB: Pillow does not write these
    pixels = zlib.compress(b"\0" + struct.pack(">HHH", 65535, 32896, 0))
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    (tmp_path / "deep.png").write_bytes(png)
    assert read(tmp_path / "deep.png").tolist() == [[[255, 128, 0]]]


# --- items


def test_plain_index_is_neither_cropped_at_random_nor_flipped(tmp_path):
    ramp = np.tile(np.arange(32, dtype=np.uint8), (8, 1))
    for n in range(3):
        Image.fromarray(ramp + n).save(tmp_path / f"{n}.png")
    images = FolderImages(tmp_path, "train", image_size=8, random_crop=True, flip=True, seed=5)
    plain = images[1]
    assert (plain["index"], plain["position"]) == (1, 1)
    columns = ((plain["image"][0, 0] + 1) * 127.5).round()
    assert torch.equal(columns, columns[0] + torch.arange(8))
    assert columns[0] % 32 in (12, 13, 14)  # the middle
    stream = [images[1, position] for position in range(20)]
    assert [item["position"] for item in stream] == list(range(20))
    assert {item["index"] for item in stream} == {1}
    assert len({item["image"].numpy().tobytes() for item in stream}) > 10
    assert torch.equal(images[1, 7]["image"], stream[7]["image"])


def test_non_square(tmp_path):
    for n in range(2):
        save(tmp_path / f"{n}.png", size=(40, 100))
    assert FolderImages(tmp_path, "val", image_size=[16, 24])[0]["image"].shape == (3, 16, 24)


# --- errors: one line that names the path and what was expected


@pytest.mark.parametrize("root", [None, "", "???"])
def test_unset_root(root):
    with pytest.raises(ValueError, match=r"^data\.root is not set.*data\.root=<folder>"):
        FolderImages(root, "train", 8)


def test_missing_folder_and_file_for_folder(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere: no such folder"):
        FolderImages(tmp_path / "nowhere", "train", 8)
    with pytest.raises(ValueError, match=r"a\.png: this is a file"):
        FolderImages(save(tmp_path / "a.png"), "train", 8)


def test_folder_without_images(tmp_path):
    (tmp_path / "readme.txt").write_text("nothing to see")
    with pytest.raises(ValueError, match=r"no images in it; expected .* jpg, jpeg, png, webp, bmp") as error:
        len(FolderImages(tmp_path, "train", 8))
    assert str(tmp_path) in str(error.value)
    save(tmp_path / "only.png")
    with pytest.raises(ValueError, match="one image in it; expected two"):
        len(FolderImages(tmp_path, "train", 8))


def test_arguments_are_checked(tmp_path):
    for wrong in [{"val_fraction": 0}, {"val_fraction": 1.0}, {"background": "whitish"}, {"split": "test"}]:
        with pytest.raises(ValueError, match=next(iter(wrong))):
            FolderImages(**{"root": tmp_path, "split": "train", "image_size": 8, **wrong})


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("damage", ["text", "empty", "cut"])
def test_undecodable_file_is_named_in_one_line(tmp_path, damage, num_workers):
    for n in range(3):
        noise = np.random.default_rng(n).integers(0, 256, (64, 64, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{n}.jpg")
    images = FolderImages(tmp_path, "train", 8)
    path = images.path(0)
    path.write_bytes({"text": b"not an image", "empty": b"", "cut": path.read_bytes()[:2000]}[damage])
    with pytest.raises(ImageError) as error:
        list(DataLoader(images, batch_size=2, num_workers=num_workers))
    traceback.clear_frames(error.tb)  # they hold the loader, whose workers would be waited for at some later time
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    assert "expected JPEG, PNG, WEBP, BMP" in message
    assert "\n" not in message

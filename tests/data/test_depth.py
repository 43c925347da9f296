"""Images of other channels and depths than 8-bit RGB, from files to tensors."""

import shutil
import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from ldm_lab.data.arrays import ArrayImage, MismatchError, Samples, to_image, turned
from ldm_lab.data.datamodule import ImageDataModule
from ldm_lab.data.decoding.arrays import decode_samples
from ldm_lab.data.drawn import DrawnImages
from ldm_lab.data.images import FolderImages, ImageError
from ldm_lab.data.transforms import center_crop, is_flipped, resize_to_cover
from ldm_lab.utils.errors import UserError
from ldm_lab.utils.pixels import RGB_8_BIT, PixelFormat
from tests.data.pictures import (
    FIVE_CHANNELS,
    MICROSCOPY,
    deep_png,
    field,
    four_corners,
    save,
    save_fields,
)

WHITE, BLACK = (255, 255, 255), (0, 0, 0)


def pair(root, image_size=(24, 36), **arguments):
    return [FolderImages(root, split, image_size, val_fraction=0.2, **arguments) for split in ("train", "val")]


def items(root, image_size=(24, 36), **arguments):
    """File name -> image, of both splits."""
    sets = pair(root, image_size, **arguments)
    return {images.path(i).name: images[i]["image"] for images in sets for i in range(len(images))}


def units(image, pixels):
    """The values of an image in the units of its data, (H, W, C)."""
    assert image.dtype == torch.float32
    assert (image.min() >= -1, image.max() <= 1, image.is_contiguous()) == (True, True, True)
    return pixels.denormalize(image).permute(1, 2, 0).numpy()


# --- files


@pytest.mark.parametrize("samples", [1, 2, 3, 4])
def test_png_of_16_bits_keeps_every_value(tmp_path, samples):
    values = np.random.default_rng(samples).integers(0, 65536, (24, 36, samples), np.uint16)
    values[0, 0], values[0, 1] = 0, 65535
    for name in ("a", "b"):
        deep_png(tmp_path / f"{name}.png", values)
    pixels = PixelFormat(samples, (0, 65535))
    found = items(tmp_path, channels=samples, value_range=[0, 65535])
    assert np.array_equal(units(found["a.png"], pixels).round(), values)


@pytest.mark.parametrize("kind", [np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32, np.float32, np.float64])
@pytest.mark.parametrize("layout", ["grey", "pages", "samples", "planes", "lzw"])
def test_tiff_of_every_type_and_layout(kind, layout):
    tifffile = pytest.importorskip("tifffile")
    if layout == "lzw":
        pytest.importorskip("imagecodecs")
    values = (np.arange(8 * 9 * 5).reshape(8, 9, 5) % 120).astype(kind)
    if layout in ("grey", "lzw"):
        values = values[..., :1]
    stored, options = {
        "grey": (values[..., 0], {}),
        "lzw": (values[..., 0], {"compression": "lzw"}),
        "pages": (values.transpose(2, 0, 1), {"photometric": "minisblack"}),
        "samples": (values, {"photometric": "minisblack", "planarconfig": "contig"}),
        "planes": (values.transpose(2, 0, 1), {"photometric": "minisblack", "planarconfig": "separate"}),
    }[layout]
    file = BytesIO()
    tifffile.imwrite(file, stored, **options)
    found = decode_samples(file.getvalue(), values.shape[2])
    assert found.array.dtype == kind
    assert np.array_equal(found.array, values)


def test_pages_are_channels_only_where_they_are_asked_for(tmp_path):
    pages = [Image.fromarray(np.full((24, 36), level, np.uint16)) for level in (100, 200, 300)]
    for name in ("a", "b"):
        pages[0].save(tmp_path / f"{name}.tif", save_all=True, append_images=pages[1:])
    pytest.importorskip("tifffile")
    first, three = ([c, items(tmp_path, channels=c, value_range=[0, 400])["a.tif"]] for c in (1, 3))
    assert units(first[1], PixelFormat(1, (0, 400))).max() == 100
    # One page of grey would be repeated; three pages are three channels.
    assert units(three[1], PixelFormat(3, (0, 400)))[0, 0].tolist() == pytest.approx([100, 200, 300])
    with pytest.raises(ImageError, match=r"\.tif: 1 channel.s., but data\.channels=2: set data\.channels=1, or give"):
        items(tmp_path, channels=2, value_range=[0, 400])


def test_grey_tiff_of_16_bits_needs_no_other_package(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "tifffile", None)
    values = np.arange(24 * 36, dtype=np.uint16).reshape(24, 36) * 70
    for name in ("a", "b"):
        Image.fromarray(values).save(tmp_path / f"{name}.tif", compression="tiff_lzw")
    found = items(tmp_path, channels=1)
    assert np.array_equal(units(found["a.tif"], MICROSCOPY).round()[..., 0], values)
    Image.fromarray(values.astype(np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(ImageError, match=r'a\.tif: reading it needs tifffile: pip install "ldm_lab\[images\]"'):
        items(tmp_path, channels=1, value_range=[0, 1e5])


@pytest.mark.parametrize("kind", ["<u2", ">u2", "<i4", ">f4", "<f8", "<f2", "?"])
def test_arrays_of_numpy_of_any_type(tmp_path, kind):
    values = (np.arange(24 * 36 * 5).reshape(24, 36, 5) % 2).astype(kind)
    for name in ("a", "b"):
        np.save(tmp_path / f"{name}.npy", values)
    found = items(tmp_path, channels=5, value_range=[0, 1])
    assert np.array_equal(units(found["a.npy"], PixelFormat(5, (0, 1))), values)


def test_five_channels_from_minus_3_to_900(tmp_path):
    found = items(save_fields(tmp_path, FIVE_CHANNELS), channels=5, value_range=[-3, 900])
    assert len(found) == 12
    for index in (0, 11):
        values = units(found[f"{index:03}.npy"], FIVE_CHANNELS)
        assert np.abs(values - field(FIVE_CHANNELS, index)).max() < 1e-4


def test_pictures_win_over_arrays_beside_them(tmp_path):
    save_fields(tmp_path, FIVE_CHANNELS)
    save(tmp_path / "x.png")
    save(tmp_path / "y.png")
    train, _ = pair(tmp_path)
    assert [name.endswith(b".png") for name in train.names] == [True]
    assert train.passed_over() == "12 .npy files"


@pytest.mark.parametrize("channels", [1, 3])
def test_arrays_of_8_bits_are_as_pictures_of_the_same_values(tmp_path, channels):
    for folder in ("arrays", "pictures"):
        (tmp_path / folder).mkdir()
    for n in range(4):
        values = np.random.default_rng(n).integers(0, 256, (30, 50, channels), np.uint8).squeeze()
        np.save(tmp_path / "arrays" / f"{n}.npy", values)
        Image.fromarray(values).save(tmp_path / "pictures" / f"{n}.png")
    arrays, pictures = (items(tmp_path / folder, 16, channels=channels) for folder in ("arrays", "pictures"))
    for n in range(4):
        assert torch.equal(arrays[f"{n}.npy"], pictures[f"{n}.png"])


@pytest.mark.parametrize("pixels", [MICROSCOPY, FIVE_CHANNELS], ids=["png", "npy"])
def test_an_archive_is_its_folder(tmp_path, pixels):
    folder = save_fields(tmp_path / "fields", pixels)
    formats = {"channels": pixels.channels, "value_range": list(pixels.value_range)}
    expected = pair(folder, **formats)
    for kind in ("zip", "tar"):
        archive = shutil.make_archive(str(folder), kind, folder)
        for one, other in zip(pair(archive, **formats), expected, strict=True):
            assert one.fingerprint() == other.fingerprint()
            assert torch.equal(one[0]["image"], other[0]["image"])


# --- range


def test_the_range_of_integers_is_that_of_the_first_file(tmp_path):
    deep, eight = np.full((24, 36), 32896, np.uint16), np.full((24, 36), 128, np.uint8)
    Image.fromarray(deep).save(tmp_path / "a.png")
    Image.fromarray(eight).save(tmp_path / "b.png")
    found = items(tmp_path, channels=1)
    assert [units(found[name], MICROSCOPY).round()[0, 0, 0] for name in ("a.png", "b.png")] == [32896, 32896]
    (tmp_path / "a.png").rename(tmp_path / "c.png")
    train, val = pair(tmp_path, channels=1)
    assert train.pixels == val.pixels == PixelFormat(1, (0, 255))


@pytest.mark.parametrize("kind", [np.float32, np.int32, np.int16])
def test_a_range_is_wanted_of_types_without_a_white(tmp_path, kind):
    save_fields(tmp_path, FIVE_CHANNELS, 2)
    for path in tmp_path.iterdir():
        np.save(path, np.load(path).astype(kind))
    for channels in (5, 3):
        with pytest.raises(ImageError) as error:
            _ = items(tmp_path, channels=channels)
        line = str(error.value)
        assert "\n" not in line
        assert "data.value_range=[LOW,HIGH], or data.value_range=measure" in line if channels == 5 else "data." in line


def test_the_range_is_measured_once_for_both_parts(tmp_path, monkeypatch):
    folder = save_fields(tmp_path / "fields", FIVE_CHANNELS)
    values = [field(FIVE_CHANNELS, index) for index in range(12)]
    expected = (min(map(np.min, values)), max(map(np.max, values)))
    train, val = pair(folder, channels=5, value_range="measure", cache_dir=tmp_path / "cache")
    train.prepare()
    monkeypatch.setattr("ldm_lab.data.value_range._measure", lambda *_: (-5.0, 900.0))
    assert train.pixels.value_range == val.pixels.value_range == pytest.approx(expected)
    for images in (train, val):
        tensor = torch.stack([images[i]["image"] for i in range(len(images))])
        assert (tensor.min() >= -1, tensor.max() <= 1) == (True, True)
    assert train.transform()["value_range"] == list(train.pixels.value_range)
    np.save(train.path(0), np.load(train.path(0)) - 2)  # of the same name and size
    again, _ = pair(folder, channels=5, value_range="measure", cache_dir=tmp_path / "cache")
    assert again.pixels.value_range == (-5, 900)


def test_a_range_that_was_measured_on_another_machine_may_differ_in_its_last_digit(tmp_path):
    for n in range(4):
        deep_png(tmp_path / f"{n}.png", np.random.default_rng(n).integers(0, 65536, (24, 36, 3), np.uint16))
    low, high = pair(tmp_path, channels=1, value_range="measure")[0].pixels.value_range
    items(tmp_path, channels=1, value_range=[np.nextafter(low, 1e9), np.nextafter(high, 0)])
    with pytest.raises(ImageError, match="outside of"):
        items(tmp_path, channels=1, value_range=[low, high - 1])


def test_equal_values_have_no_range(tmp_path):
    for n in range(3):
        np.save(tmp_path / f"{n}.npy", np.full((8, 8), 7.0))
    with pytest.raises(UserError, match=r"^data\.value_range=measure: all values are 7: give data\.value_range="):
        _ = pair(tmp_path, channels=1, value_range="measure")[0].pixels


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (np.nan, "holds NaN"),
        (np.inf, "holds infinity"),
        (-np.inf, "holds infinity"),
        (901, r"holds the value 901, outside of data\.value_range=\[-3,900\]: widen it, or data\.value_range=measure"),
        (-3.5, r"holds the value -3\.5, outside of"),
    ],
)
@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_values_that_cannot_be_are_refused_by_name(tmp_path, value, said, on_error):
    save_fields(tmp_path, FIVE_CHANNELS)
    (train, _) = pair(tmp_path, channels=5, value_range=[-3, 900], on_error=on_error)
    array = np.load(train.path(2))
    array[3, 4, 1] = value
    np.save(train.path(2), array)
    if on_error == "raise":
        with pytest.raises(ImageError, match=rf"^{train.path(2)}: {said}"):
            train[2]
    else:
        assert said[:8] in train[2]["skipped"]
        assert train[2]["index"] == 3


@pytest.mark.parametrize("value_range", [[1], [1, 1], [2, 1], [0, float("nan")], "wide", [0, 1, 2], ["a", "b"]])
def test_a_range_is_two_numbers_in_order(tmp_path, value_range):
    with pytest.raises(UserError, match=r"^data\.value_range="):
        FolderImages(tmp_path, "train", 8, value_range=value_range)


# --- channels


def test_channels_that_do_not_fit_are_named(tmp_path):
    save_fields(tmp_path, FIVE_CHANNELS)
    said = r"\.npy: 5 channel\(s\), but data\.channels={}: set data\.channels=5, or give other files"
    for channels in (1, 3, 4):
        with pytest.raises(ImageError, match=said.format(channels)):
            pair(tmp_path, channels=channels, value_range=[-3, 900])[0][0]


@pytest.mark.parametrize("value_range", [None, [0, 255]])
def test_one_channel_of_colours_is_their_luma_and_grey_in_colour_is_repeated(tmp_path, value_range):
    for name in ("a", "b"):
        four_corners(36, 24).save(tmp_path / f"{name}.png")
    grey = items(tmp_path, channels=1, value_range=value_range)["a.png"]
    assert grey.shape == (1, 24, 36)
    corners = units(grey, PixelFormat(1, (0, 255)))[[2, 2, -2, -2], [2, -2, 2, -2], 0]
    assert corners.tolist() == pytest.approx([76.2, 149.7, 29.1, 225.9], abs=0.5)
    for name in ("a", "b"):
        four_corners(36, 24).convert("L").save(tmp_path / f"{name}.png")
    colour = items(tmp_path, channels=3, value_range=value_range)["a.png"]
    assert torch.equal(colour[0], colour[1])
    assert torch.equal(colour[:1].round(decimals=5), items(tmp_path, channels=1)["a.png"].round(decimals=5))


@pytest.mark.parametrize("background", ["white", "black"])
def test_transparency_lies_over_the_background_or_is_a_channel(tmp_path, background):
    values = np.zeros((24, 36, 4), np.uint16)
    values[..., 0], values[:, 18:, 3] = 50000, 65535  # red, the left half transparent
    for name in ("a", "b"):
        deep_png(tmp_path / f"{name}.png", values)
    three, four, one = (
        units(
            items(tmp_path, channels=c, background=background, value_range=[0, 65535])["a.png"],
            PixelFormat(c, (0, 65535)),
        )
        for c in (3, 4, 1)
    )
    behind = 65535 if background == "white" else 0
    assert three[0, 0].tolist() == [behind] * 3
    assert three[0, -1].tolist() == pytest.approx([50000, 0, 0], abs=0.1)
    assert np.array_equal(four.round(), values)
    assert one[0, 0, 0] == pytest.approx(behind, abs=0.1)


def test_the_transparent_colour_of_a_deep_png(tmp_path):
    values = np.array([[[1, 2, 3], [65535, 2, 3]]], np.uint16)
    data = b"tRNS" + struct.pack(">3H", 1, 2, 3)
    deep_png(tmp_path / "x.png", values, struct.pack(">I", 6) + data + struct.pack(">I", zlib.crc32(data)))
    found = decode_samples((tmp_path / "x.png").read_bytes(), 3)
    assert found.array[0, :, 3].tolist() == [0, 65535]


def test_grey_of_8_bits_takes_one_channel_all_the_way(tmp_path):
    for n in range(3):
        Image.fromarray(np.random.default_rng(n).integers(0, 256, (28, 28), np.uint8)).save(tmp_path / f"{n}.png")
    train, _ = pair(tmp_path, 32, channels=1)
    picture = train.read(0)
    assert picture.mode == "L"
    assert torch.equal(train[0]["image"][0], pair(tmp_path, 32)[0][0]["image"][0])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_deep_pictures_are_turned_upright(tmp_path, orientation):
    for depth, name in ((np.uint8, "x.png"), (np.uint16, "y.png")):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(np.arange(12, dtype=depth).reshape(3, 4)).save(tmp_path / name, exif=exif)
    eight, deep = (decode_samples((tmp_path / name).read_bytes(), 1).array for name in ("x.png", "y.png"))
    assert np.array_equal(eight, deep)


@pytest.mark.parametrize("turn", list(Image.Transpose))
def test_arrays_turn_as_pictures_do(turn):
    values = np.arange(12, dtype=np.uint8).reshape(3, 4)
    assert np.array_equal(turned(values, turn), np.asarray(Image.fromarray(values).transpose(turn)))


# --- resizing and cropping


@pytest.mark.parametrize("size", [(16, 16), (40, 64), (12, 36)])
def test_resizing_is_pillows_without_its_rounding(size):
    """The oracle: Pillow's own bicubic filter of floats."""
    values = field(PixelFormat(3, (-1, 1)), size=(31, 47))
    image = ArrayImage(torch.from_numpy(values).permute(2, 0, 1).contiguous())
    found = resize_to_cover(image, size)
    for channel in range(3):
        expected = Image.fromarray(values[..., channel]).resize(found.size, Image.Resampling.BICUBIC)
        assert np.abs(found.values[channel].numpy() - np.asarray(expected)).max() < 1e-5
    assert center_crop(found, size).values.shape == (3, *size)


def test_16_bits_survive_reading_resizing_and_cropping(tmp_path):
    """A ramp of 16-bit values one apart: in 8 bits all of them would be one value, or two."""
    ramp = (30000 + np.arange(64, dtype=np.uint16)[:, None].repeat(96, 1)).astype(np.uint16)
    for name in ("a", "b"):
        Image.fromarray(ramp).save(tmp_path / f"{name}.png")
    whole = units(items(tmp_path, (64, 64), channels=1)["a.png"], MICROSCOPY)[..., 0]
    assert np.abs(whole[:, 0] - ramp[:, 0]).max() < 0.01
    half = units(items(tmp_path, (32, 32), channels=1)["a.png"], MICROSCOPY)[..., 0]
    expected = 30000.5 + 2 * np.arange(32)  # means of two rows
    assert np.abs(half[2:-2, 0] - expected[2:-2]).max() < 0.02
    train = FolderImages(tmp_path, "train", (32, 48), channels=1, random_crop=True, flip=True, seed=3)
    for position in range(8):
        cropped = units(train[0, position]["image"], MICROSCOPY)[..., 0]
        assert len(np.unique(cropped.round(1))) >= 32
        assert torch.equal(train[0, position]["image"], train[0, position]["image"])


def test_crops_and_flips_are_those_of_8_bit_pictures(tmp_path):
    for name in ("a", "b"):
        four_corners(50, 30).save(tmp_path / f"{name}.png")
    plain, deep = (
        FolderImages(tmp_path, "train", (16, 20), random_crop=True, flip=True, seed=7, value_range=value_range)
        for value_range in (None, [0, 255])
    )
    flips = [is_flipped(7, position) for position in range(12)]
    assert set(flips) == {True, False}
    for position in range(12):
        one, other = (images[0, position]["image"] for images in (plain, deep))
        assert (one - other).abs().mean() < 0.003  # Pillow clips after each of its two passes


def test_overshoot_beside_an_edge_is_clamped(tmp_path):
    edge = np.zeros((24, 36), np.uint16)
    edge[:, 18:] = 65535
    for name in ("a", "b"):
        Image.fromarray(edge).save(tmp_path / f"{name}.png")
    image = items(tmp_path, (48, 72), channels=1)["a.png"]
    assert (image.min(), image.max()) == (-1, 1)


# --- sets


def test_the_default_is_8_bit_rgb_and_opens_no_file(tmp_path):
    save(tmp_path / "x.png").write_bytes(b"no image")
    (tmp_path / "y.png").write_bytes(b"no image")
    train, _ = pair(tmp_path)
    assert train.pixels == RGB_8_BIT
    assert train.transform().keys() == {"image_size", "crop", "background"}


def test_caches_of_latents_depend_on_channels_and_range(tmp_path):
    save_fields(tmp_path, MICROSCOPY)
    known = [{}, {"channels": 1}, {"channels": 1, "value_range": [0, 65535]}, {"value_range": [0, 65535]}]
    known.append({"channels": 1, "value_range": [0, 4095]})
    transforms = [str(pair(tmp_path, **one)[0].transform()) for one in known]
    assert transforms[1] == transforms[2]
    assert len(set(transforms)) == 4


def test_workers_know_the_range_of_their_parent(tmp_path):
    sets = pair(save_fields(tmp_path, MICROSCOPY), channels=1, value_range="measure")
    data = ImageDataModule(*sets, global_batch_size=4)
    data.setup("fit")
    assert "pixels" in vars(sets[0])
    assert "pixels" in vars(sets[1])
    assert "1 channel(s) from" in data.census()
    loaded = torch.cat([batch["image"] for batch in DataLoader(sets[0], batch_size=2, num_workers=1)])
    assert torch.equal(loaded, torch.stack([sets[0][i]["image"] for i in range(len(sets[0]))]))


def test_drawn_fields_have_the_format_that_is_asked_for():
    for pixels in (FIVE_CHANNELS, MICROSCOPY):
        images = DrawnImages("train", 32, channels=pixels.channels, value_range=list(pixels.value_range))
        assert images.pixels == pixels
        assert images[0]["image"].shape == (pixels.channels, 32, 32)
        assert torch.equal(images[3]["image"], images[3]["image"])
        assert images.fingerprint() != DrawnImages("train", 32).fingerprint()
    assert DrawnImages("train", 32).pixels == RGB_8_BIT


def test_integers_of_32_bits_far_from_zero_keep_their_steps():
    values = (2**31 - 100 + np.arange(64)).astype(np.uint32).reshape(8, 8, 1)
    pixels = PixelFormat(1, (2**31 - 100, 2**31 - 37))
    image = to_image(Samples(values, colours=False), pixels, BLACK)
    assert torch.allclose(image.values.flatten(), torch.linspace(-1, 1, 64))
    with pytest.raises(
        MismatchError, match=r"holds the value 2147483611, outside of data\.value_range=\[0,2147483598\]"
    ):
        to_image(Samples(values, colours=False), PixelFormat(1, (0, 2**31 - 50)), WHITE)

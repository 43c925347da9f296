"""Samples of any number of channels and any depth as files, and what becomes of them there."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from ldm_lab.sampling.files import RGB_PNG, SampleFiles, collect
from ldm_lab.utils import png16
from ldm_lab.utils.errors import UserError
from ldm_lab.utils.pixels import PixelFormat
from ldm_lab.utils.reading import LoadError

FIVE = PixelFormat(5, (-3.0, 900.0))


def drawn(channels, count=3):
    """Images as the pipeline returns them: `(N, 4, 6, C)` in [0, 1]."""
    return np.random.default_rng(0).random((count, 4, 6, channels), dtype=np.float32)


def write(files, folder, count=3):
    images = drawn(files.channels, count)
    files.write({files.path(folder, index): image for index, image in enumerate(images)})
    return images


@pytest.mark.parametrize("channels", [1, 3])
def test_png_files_of_16_bits_hold_every_value(tmp_path, channels):
    values = np.random.default_rng(0).integers(0, 2**16, (40, 25, channels)).astype(np.uint16)
    path = tmp_path / "deep.png"
    path.write_bytes(png16.encode(values))
    assert np.array_equal(png16.read(path), values)
    with Image.open(path) as image:  # another reader, which checks the CRCs
        image.load()
        assert image.size == (25, 40)
        shallow = np.asarray(image).reshape(values.shape)
    assert np.array_equal(shallow, values if channels == 1 else values >> 8)


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n", png16.encode(np.zeros((4, 4, 1), np.uint16))[:-20]])
def test_damaged_png_files_end_in_one_line(tmp_path, content):
    (tmp_path / "deep.png").write_bytes(content)
    with pytest.raises(LoadError, match=r"deep\.png: not a PNG file"):
        png16.read(tmp_path / "deep.png")


@pytest.mark.parametrize("pixels", [PixelFormat(1, (0.0, 65535.0)), PixelFormat(3, (-1.5, 2.5)), FIVE])
def test_samples_come_back_as_they_were_drawn(tmp_path, pixels):
    files = SampleFiles.deepest(pixels)
    images = write(files, tmp_path)
    back = torch.stack([files.read(files.path(tmp_path, index)) for index in range(3)])
    assert back.shape == (3, pixels.channels, 4, 6)
    error = (back - torch.from_numpy(images).permute(0, 3, 1, 2) * 2 + 1).abs().max()
    assert error <= (1e-6 if pixels == FIVE else 1.01 / 65535)


def test_arrays_are_in_the_units_of_the_data(tmp_path):
    files = SampleFiles.of(FIVE)
    images = write(files, tmp_path, 1)
    array = np.load(files.path(tmp_path, 0), allow_pickle=False)
    assert (array.shape, array.dtype) == ((4, 6, 5), np.float32)
    np.testing.assert_allclose(array, -3 + images[0] * 903.0, rtol=1e-6)


@pytest.mark.parametrize("pixels", [PixelFormat(1, (0.0, 65535.0)), FIVE])
def test_files_that_are_missing_or_cut_off_are_drawn_again(tmp_path, pixels):
    files = SampleFiles.deepest(pixels)
    write(files, tmp_path, 4)
    files.path(tmp_path, 1).unlink()
    whole = files.path(tmp_path, 2).read_bytes()
    files.path(tmp_path, 2).write_bytes(whole[:-7])
    files.path(tmp_path, 3).write_bytes(b"")
    assert files.missing(tmp_path, 5) == [1, 2, 3, 4]


def test_only_rgb_has_an_array_for_the_evaluator(tmp_path, capsys):
    deep = SampleFiles.of(PixelFormat(3, (0.0, 65535.0)), 16)
    images = write(deep, tmp_path / "rgb")
    assert collect(tmp_path / "rgb", 3, deep) == ["grid.png", "samples.npz"]
    with np.load(tmp_path / "rgb/samples.npz") as archive:
        assert archive["arr_0"].dtype == np.uint8
        assert np.abs(archive["arr_0"] - images * 255).max() < 0.51
    files = SampleFiles.of(FIVE)
    write(files, tmp_path / "five")
    assert collect(tmp_path / "five", 3, files, preview=[4]) == ["grid.png"]
    assert "no samples.npz" in capsys.readouterr().out
    grid = np.asarray(Image.open(tmp_path / "five/grid.png"))
    assert np.array_equal(grid[..., 0], grid[..., 2])
    assert abs(int(grid[2, 2, 0]) - drawn(5)[0, 0, 0, 4] * 255) < 0.6


def test_no_png_has_five_channels():
    with pytest.raises(UserError, match=r"bit_depth=16: is for PNG files.*5 channels.*leave bit_depth out"):
        SampleFiles.of(FIVE, 16)


def test_settings_are_those_of_a_manifest():
    for files in (RGB_PNG, SampleFiles.of(FIVE), SampleFiles.deepest(PixelFormat(1, (0.0, 65535.0)))):
        known = {"channels": files.channels, "value_range": files.value_range, "bit_depth": files.bit_depth}
        again = SampleFiles(**json.loads(json.dumps(known)))
        assert (again.pixels, again.suffix, again.stored_range) == (files.pixels, files.suffix, files.stored_range)

"""Images at the border: ranges, rounding, grids, files."""

import numpy as np
import pytest
import torch
from PIL import Image

from ldm_lab.utils.images import grid, save_png, to_numpy, to_pil, to_uint8, to_unit
from ldm_lab.utils.writing import SaveError


def test_the_unit_range_is_clamped():
    values = torch.tensor([-3.0, -1.0, 0.0, 0.5, 1.0, 7.0])
    assert to_unit(values).tolist() == [0, 0, 0.5, 0.75, 1, 1]


def test_channels_go_last():
    images = torch.rand(2, 3, 4, 5)
    array = to_numpy(images.to(torch.bfloat16))
    assert (array.shape, array.dtype) == ((2, 4, 5, 3), np.float32)
    assert array[1, 2, 3, 0] == images[1, 0, 2, 3].bfloat16().item()
    assert to_uint8(images).shape == (2, 4, 5, 3)


def test_every_byte_comes_back():
    levels = torch.arange(256).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert np.array_equal(to_uint8(levels / 255)[0, ..., 0], np.arange(256).reshape(16, 16))
    # the way through the networks' range keeps them too
    assert np.array_equal(to_uint8(to_unit(levels / 127.5 - 1))[0, ..., 2], np.arange(256).reshape(16, 16))


@pytest.mark.parametrize(("value", "byte"), [(0.49, 0), (0.51, 1), (254.49, 254), (254.51, 255)])
def test_bytes_are_rounded_and_not_cut_off(value, byte):
    assert to_uint8(torch.full((1, 3, 1, 1), value / 255)).tolist() == [[[[byte] * 3]]]


def test_pictures_hold_the_bytes():
    images = torch.rand(2, 3, 4, 5)
    pictures = to_pil(images)
    assert [(picture.mode, picture.size) for picture in pictures] == [("RGB", (5, 4))] * 2
    assert np.array_equal(np.stack([np.asarray(picture) for picture in pictures]), to_uint8(images))


def tiles(count, height=2, width=3):
    return [np.full((height, width, 3), index, dtype=np.uint8) for index in range(count)]


@pytest.mark.parametrize(
    ("count", "columns", "size"),
    [(1, None, (5, 4)), (4, None, (9, 7)), (5, None, (13, 7)), (5, 2, (9, 10)), (3, 5, (21, 4))],
)
def test_grids_are_as_square_as_it_goes(count, columns, size):
    assert grid(tiles(count), columns=columns, gap=1).size == size


def test_a_grid_goes_row_by_row_on_white():
    sheet = np.asarray(grid(tiles(5), gap=1))
    expected = np.full((7, 13, 3), 255)
    expected[1:3, 1:4], expected[1:3, 5:8], expected[1:3, 9:12] = 0, 1, 2
    expected[4:6, 1:4], expected[4:6, 5:8] = 3, 4
    assert np.array_equal(sheet, expected)


def test_a_png_comes_back(tmp_path):
    picture = to_pil(torch.rand(1, 3, 4, 5))[0]
    path = tmp_path / "new" / "image.png"
    save_png(picture, path)
    with Image.open(path) as back:
        assert back.format == "PNG"
        assert np.array_equal(np.asarray(back), np.asarray(picture))
    assert list(path.parent.iterdir()) == [path]


def test_a_png_is_written_whole_or_not_at_all(tmp_path):
    class Broken:
        def save(self, path, format):  # noqa: A002
            path.write_bytes(b"half")
            raise OSError("disk full")

    path = tmp_path / "image.png"
    save_png(to_pil(torch.rand(1, 3, 4, 5))[0], path)
    before = path.read_bytes()
    with pytest.raises(SaveError, match="disk full"):
        save_png(Broken(), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]

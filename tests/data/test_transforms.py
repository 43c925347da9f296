import numpy as np
import pytest
import torch
from PIL import Image

from ldm_lab.data.transforms import center_crop, parse_size, random_crop, random_flip, resize_to_cover, to_tensor


def coordinates(height, width):
    """An image whose red is the row and whose green is the column."""
    rows, columns = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([rows, columns, 0 * rows], axis=-1).astype(np.uint8))


def top_left(image):
    return image.getpixel((0, 0))[:2]


def test_to_tensor_spans_minus_one_to_one():
    tensor = to_tensor(Image.fromarray(np.array([[[0, 255, 51]]], np.uint8)))
    torch.testing.assert_close(tensor.flatten(), torch.tensor([-1.0, 1.0, 51 / 127.5 - 1]))
    assert tensor.shape == (3, 1, 1)
    assert tensor.dtype == torch.float32


@pytest.mark.parametrize(
    ("found", "wanted", "covering"),
    [
        ((60, 90), (30, 30), (30, 45)),  # (height, width)
        ((90, 60), (30, 30), (45, 30)),
        ((60, 90), (20, 60), (40, 60)),  # the crop is wider than the picture
        ((60, 90), (60, 60), (60, 90)),
        ((10, 10), (64, 32), (64, 64)),  # smaller than the crop
        ((333, 1000), (7, 7), (7, 21)),
    ],
)
def test_resize_covers_the_crop_and_no_more(found, wanted, covering):
    resized = resize_to_cover(Image.new("RGB", found[::-1]), wanted)
    assert resized.size == covering[::-1]


def test_shrinking_averages_instead_of_skipping():
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255  # finer than the result can show
    small = np.asarray(resize_to_cover(Image.fromarray(stripes), (16, 16)), dtype=float)
    assert abs(small - 127.5).max() < 10


def test_center_crop_takes_the_middle():
    crop = center_crop(coordinates(20, 50), (10, 30))
    assert crop.size == (30, 10)
    assert top_left(crop) == (5, 10)


def test_random_crop_reaches_every_placement_and_nothing_outside():
    image = coordinates(12, 11)
    corners = {top_left(random_crop(image, (10, 10), seed=0, position=n)) for n in range(100)}
    assert corners == {(row, column) for row in range(3) for column in range(2)}


@pytest.mark.parametrize("change", [random_flip, lambda image, *key: random_crop(image, (8, 8), *key)])
def test_randomness_is_a_function_of_seed_and_position(change):
    image = coordinates(16, 16)
    draws = {key: change(image, *key).tobytes() for key in [(s, n) for s in (0, 1) for n in range(32)]}
    torch.manual_seed(99)
    np.random.seed(99)
    assert all(change(image, *key).tobytes() == draws[key] for key in reversed(draws))
    assert [draws[0, n] for n in range(32)] != [draws[1, n] for n in range(32)]


def test_half_of_the_images_are_flipped():
    image = coordinates(2, 2)
    flips = [random_flip(image, seed=3, position=n).getpixel((0, 0))[1] for n in range(400)]
    assert 160 < sum(flips) < 240


@pytest.mark.parametrize(("given", "size"), [(64, (64, 64)), ([48, 64], (48, 64)), ((1, 2), (1, 2))])
def test_image_size(given, size):
    assert parse_size(given) == size


def test_image_size_as_hydra_passes_it():
    omegaconf = pytest.importorskip("omegaconf")
    assert parse_size(omegaconf.OmegaConf.create([48, 64])) == (48, 64)


@pytest.mark.parametrize("given", [0, -1, [64], [64, 0], [1, 2, 3], "64", 64.0, True, None, [64.0, 64]])
def test_impossible_image_sizes_are_refused(given):
    with pytest.raises(ValueError, match=r"^data\.image_size=.*positive whole number") as error:
        parse_size(given)
    assert "\n" not in str(error.value)

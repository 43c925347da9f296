import pytest
import torch

from ldm_lab.utils.errors import UserError
from ldm_lab.utils.pixels import PixelFormat


def test_both_ways_give_every_16_bit_value_back():
    values = torch.arange(65536, dtype=torch.int32)
    pixels = PixelFormat(1, (0, 65535))
    images = pixels.normalize(values)
    assert images.dtype == torch.float32
    assert (images[0].item(), images[-1].item()) == (-1, 1)
    assert torch.equal(pixels.denormalize(images).round().int(), values)


def test_values_outside_the_range_are_clamped_on_the_way_back():
    assert PixelFormat(5, (-3, 900)).denormalize(torch.tensor([-1.5, -1, 0, 1, 2])).tolist() == [
        -3,
        -3,
        448.5,
        900,
        900,
    ]


@pytest.mark.parametrize("bad", [(0, (0, 1)), (1, (1, 1)), (1, (2, 1)), (1, (0, float("inf"))), (1, (float("nan"), 1))])
def test_an_impossible_format_is_refused(bad):
    with pytest.raises(UserError, match=r"data\.(channels|value_range)="):
        PixelFormat(*bad)

"""Errors of colour count as much as they are told to."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import mse_loss

from ldm_lab.losses.pixel import ColourMSE


def test_a_grey_error_counts_as_in_the_mean_over_rgb():
    torch.manual_seed(0)
    target, error = torch.rand(2, 3, 5, 7), torch.randn(2, 1, 5, 7).expand(-1, 3, -1, -1)
    for chroma in (0.0, 1.0, 9.0):
        torch.testing.assert_close(ColourMSE(chroma)(target + error, target), mse_loss(target + error, target))


def test_it_is_the_error_of_the_pictures_luma_and_chroma():
    """As Pillow has them, which rounds to whole numbers."""
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    y, cb, cr = np.moveaxis(np.stack([Image.fromarray(one).convert("YCbCr") for one in pixels]).astype(float), -1, 0)
    a, b = torch.from_numpy(pixels).movedim(-1, 1)[:, None].float()
    squares = [np.square(part[0] - part[1]).mean() for part in (y, cb, cr)]
    for chroma in (0.0, 4.0):
        expected = squares[0] + chroma * (squares[1] + squares[2])
        assert ColourMSE(chroma)(a, b).item() == pytest.approx(expected, rel=1e-2)


def test_a_hue_costs_more_than_a_grey_of_the_same_mean_square():
    target = torch.zeros(1, 3, 2, 2)
    yellow = torch.tensor([1.0, 1.0, -1.0]).view(1, 3, 1, 1).expand(-1, -1, 2, 2)
    grey = torch.ones(1, 3, 2, 2)
    assert ColourMSE(4.0)(yellow, target) > 3 * ColourMSE(4.0)(grey, target)


def test_training_states_hold_nothing_of_it():
    assert not ColourMSE().state_dict()


def test_a_negative_weight_is_refused():
    with pytest.raises(ValueError, match=r"^model\.loss\.pixel\.chroma=-1: must be at least 0$"):
        ColourMSE(-1)


def test_autocast_rounds_nothing():
    torch.manual_seed(0)
    images = torch.rand(2, 2, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = ColourMSE()(*images)
    assert torch.equal(rounded, ColourMSE()(*images))

import math

import numpy as np
import pytest
import torch
from PIL import Image

from ldm_lab.metrics.reconstruction import hues_kept, psnr, psnr_chroma, ssim
from ldm_lab.utils.images import to_uint8, to_unit


def images(seed=0, shape=(3, 3, 32, 32)):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 1.8 - 0.9


def test_psnr_of_a_known_error():
    target = images()
    # An error of 2/255 in [-1, 1] is one step of 8 bits: 20 log10(255) dB.
    assert psnr(target + 2 / 255, target).item() == pytest.approx(20 * math.log10(255), abs=1e-3)


def test_psnr_is_averaged_over_images_not_over_errors():
    target = torch.zeros(2, 3, 8, 8)
    errors = torch.tensor([0.02, 0.2]).view(2, 1, 1, 1)  # 40 and 20 dB
    assert psnr(target + errors, target).item() == pytest.approx(30.0, abs=1e-3)


def test_values_outside_the_range_are_clamped():
    target = torch.ones(1, 3, 16, 16)
    assert psnr(target * 3, target).item() == math.inf
    assert ssim(target * 3, target).item() == pytest.approx(1.0)


def test_ssim_against_its_formula_on_constant_images():
    # Without variance SSIM is its luminance term alone, (2 x y + c) / (x² + y² + c), c = 0.01², images in [0, 1].
    x, y = 0.25, 0.75
    result = ssim(torch.full((1, 3, 32, 32), 2 * x - 1), torch.full((1, 3, 32, 32), 2 * y - 1))
    assert result.item() == pytest.approx((2 * x * y + 1e-4) / (x**2 + y**2 + 1e-4), abs=1e-3)


def test_ssim_falls_with_noise():
    target = images()
    values = [ssim(target + noise * images(1), target).item() for noise in (0.0, 0.1, 0.3, 1.0)]
    assert values[0] == pytest.approx(1.0)
    assert values == sorted(values, reverse=True)
    assert values[-1] < 0.8


def test_reduced_precision_around_the_call_changes_nothing():
    target, reconstruction = images(), images() + 0.05 * images(1)
    expected = psnr(reconstruction, target), ssim(reconstruction, target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (psnr(reconstruction, target), ssim(reconstruction, target)) == expected


def painted(*colours):
    """An image of vertical stripes of these colours, RGB in [0, 1]: `(1, 3, 8, W)` in [-1, 1]."""
    return (torch.tensor(colours).T[None, :, None].repeat_interleave(4, dim=3).expand(1, 3, 8, -1) * 2 - 1).clone()


RED, GREEN, BLUE, GREY, WHITE = (0.8, 0.1, 0.1), (0.1, 0.7, 0.2), (0.1, 0.2, 0.8), (0.5, 0.5, 0.5), (1.0, 1.0, 1.0)


def test_chroma_sees_colour_alone():
    """The oracle is Pillow's conversion of the 8-bit images."""
    target, reconstruction = painted(RED, GREEN, BLUE), painted(GREEN, GREEN, GREY)
    assert psnr_chroma(target * 0.5 + 0.1, target * 0.5).item() > 100  # brighter by a grey
    rounded = [to_uint8(to_unit(images))[0] for images in (reconstruction, target)]
    cb_cr = [np.asarray(Image.fromarray(image).convert("YCbCr"), dtype=np.float64)[..., 1:] / 255 for image in rounded]
    expected = -10 * math.log10(((cb_cr[0] - cb_cr[1]) ** 2).mean())
    assert psnr_chroma(reconstruction, target).item() == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize(
    ("found", "kept"),
    [
        ((RED, GREEN, BLUE, WHITE), 1.0),
        ((GREY, GREY, GREY, GREY), 0.0),  # of the right brightness or not
        ((GREEN, RED, BLUE, RED), 1 / 3),  # white has no hue to keep
        (((0.66, 0.27, 0.27), GREEN, BLUE, WHITE), 1.0),  # paler, to half
        (((0.55, 0.42, 0.42), GREEN, BLUE, WHITE), 2 / 3),  # and less
        (((0.8, 0.3, 0.1), (0.45, 0.7, 0.2), BLUE, WHITE), 2 / 3),  # a little orange; no green any more
    ],
)
def test_hues_are_kept_within_an_angle_and_a_saturation(found, kept):
    assert hues_kept(painted(*found), painted(RED, GREEN, BLUE, WHITE)).item() == pytest.approx(kept)


def test_images_without_colour_have_no_hue_to_lose():
    assert hues_kept(painted(RED, GREEN), painted(GREY, WHITE)).item() == 1.0

"""Lengths as people type them."""

import pytest

from ldm_lab.utils.lengths import parse_images, short


@pytest.mark.parametrize(
    ("text", "images"),
    [("4000", 4000), (4000, 4000), ("250k", 250_000), ("2M", 2_000_000), ("1.1M", 1_100_000), (" 2 M ", 2_000_000)],
)
def test_units(text, images):
    assert parse_images(text, "max_images") == images


def test_epochs_are_of_the_training_images_and_never_cut_short():
    assert parse_images("100ep", "max_images", epoch=3891) == 389_100
    assert parse_images("0.5ep", "max_images", epoch=3) == 2


def test_a_share_is_of_the_stage():
    assert parse_images("25%", "snapshots", stage=24_000) == 6000
    assert parse_images("33.3%", "snapshots", stage=100) == 34
    with pytest.raises(ValueError, match=r"^max_images=25%: must be a whole number of images, such as 4000"):
        parse_images("25%", "max_images")


@pytest.mark.parametrize("text", ["many", "2m", "-3", "1e6", "", "M", "2 Mio", "1.0005", "0.0000001M", None])
def test_anything_else_is_refused_by_name(text):
    with pytest.raises(ValueError, match=f"^max_images={text}: "):
        parse_images(text, "max_images")


def test_epochs_need_to_be_known():
    with pytest.raises(ValueError, match=r"^validate_every=3ep: must be a whole number of images"):
        parse_images("3ep", "validate_every")


@pytest.mark.parametrize("images", [0, 7, 1000, 1_234_000, 2_000_000, 2_000_016])
def test_the_short_form_says_the_same(images):
    assert parse_images(short(images), "") == images
    assert len(short(images)) <= len(str(images))

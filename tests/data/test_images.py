import traceback

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from ldm_lab.data.held_out import is_held_out
from ldm_lab.data.images import FolderImages, ImageError
from tests.data.pictures import BLUE, save

# --- how images are divided


def split(names, fraction):
    held_out = is_held_out(np.array([name.encode() for name in names]), fraction)
    train = {name for name, held in zip(names, held_out, strict=True) if not held}
    return train, set(names) - train


def test_split_does_not_move_when_images_come_or_go():
    names = [f"folder/{n:04d}.jpg" for n in range(400)]
    train, val = split(names, 0.1)
    assert 20 <= len(val) <= 60
    more_train, more_val = split([f"new{n}.png" for n in range(100)] + names, 0.1)
    assert train <= more_train
    assert val <= more_val
    assert val < split(names, 0.2)[1]


def test_split_is_the_same_for_ever():
    assert split([f"{n}.png" for n in range(30)], 0.1)[1] == {"17.png", "18.png"}


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
@pytest.mark.parametrize("count", [2, 3, 10])
def test_neither_part_is_empty(count, fraction):
    train, val = split([str(n) for n in range(count)], fraction)
    assert sorted([len(train), len(val)]) == [1, count - 1]


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


def test_arguments_are_checked(tmp_path):
    wrong = {"val_fraction": [0, 1.0], "background": ["whitish"], "split": ["test"], "on_error": ["ignore", True]}
    for key, values in wrong.items():
        for value in values:
            with pytest.raises(ValueError, match=f"{key}=") as error:
                FolderImages(**{"root": tmp_path, "split": "train", "image_size": 8, key: value})
            assert "\n" not in str(error.value)


# --- files that cannot be decoded


def noise_images(folder, count, broken=(), **arguments):
    """A training set of `count` different images, those at the indices `broken` cut short."""
    for n in range(count + 1):
        noise = np.random.default_rng(n).integers(0, 256, (24, 60, 3), np.uint8)
        Image.fromarray(noise).save(folder / f"{n:03}.png")
    # One image is held out: the fraction is smaller than any name's number.
    images = FolderImages(folder, "train", 8, val_fraction=1e-9, **arguments)
    assert len(images) == count
    for index in broken:
        images.path(index).write_bytes(images.path(index).read_bytes()[:200])
    return images


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("damage", ["text", "empty", "cut"])
def test_undecodable_file_is_named_in_one_line(tmp_path, damage, num_workers):
    images = noise_images(tmp_path, 3)
    path = images.path(0)
    path.write_bytes({"text": b"not an image", "empty": b"", "cut": path.read_bytes()[:200]}[damage])
    with pytest.raises(ImageError) as error:
        list(DataLoader(images, batch_size=2, num_workers=num_workers))
    traceback.clear_frames(error.tb)  # they hold the loader, whose workers would be waited for at some later time
    message = str(error.value)
    assert message.startswith(
        f"{path}: {'cannot be read: ' if damage == 'cut' else 'not an image; expected JPEG, PNG'}"
    )
    assert message.endswith("; data.on_error=skip passes over such files")
    assert "\n" not in message


def test_skip_takes_the_next_image_that_can_be_decoded(tmp_path):
    images = noise_images(tmp_path, 6, broken=[1, 2, 5], on_error="skip")
    items = [images[index] for index in range(6)]
    assert [item["index"] for item in items] == [0, 3, 3, 3, 4, 0]  # after the last comes the first
    assert [item["position"] for item in items] == list(range(6))
    assert torch.equal(items[1]["image"], items[3]["image"])
    skipped = [[line.partition(": ")[0] for line in item["skipped"].split("\n") if line] for item in items]
    one, two, five = (str(images.path(index)) for index in (1, 2, 5))
    assert skipped == [[], [one, two], [two], [], [], [five]]
    assert "cannot be read: " in items[1]["skipped"]
    assert [item["index"] for item in images] == [item["index"] for item in items]  # and it has an end


def test_what_is_skipped_depends_on_the_index_alone(tmp_path):
    images = noise_images(tmp_path, 12, broken=[3, 4, 11], on_error="skip", random_crop=True, flip=True)
    keys = [(index, 100 + index) for index in range(12)]

    def loaded(batch_size, num_workers=0):
        batches = [keys[start : start + batch_size] for start in range(0, 12, batch_size)]
        items = list(DataLoader(images, batch_sampler=batches, num_workers=num_workers))
        assert [line for item in items for line in item["skipped"]] == [images[key]["skipped"] for key in keys]
        return torch.cat([item["image"] for item in items])

    whole = loaded(12)
    assert torch.equal(whole, loaded(3))
    assert torch.equal(whole, loaded(4, num_workers=2))
    assert torch.equal(whole[3], images[5, 103]["image"])  # cropped for its place in the stream
    assert not torch.equal(whole[3], whole[5])


def test_skip_ends_where_all_files_are_broken(tmp_path, monkeypatch):
    images = noise_images(tmp_path, 4, broken=range(4), on_error="skip")
    with pytest.raises(
        ImageError, match=r"^4 file\(s\) in a row cannot be decoded; the first: .*: cannot be read: "
    ) as error:
        images[2]
    assert str(images.path(2)) in str(error.value)
    monkeypatch.setattr(FolderImages, "MOST_IN_A_ROW", 2)
    with pytest.raises(ImageError, match=r"^2 file\(s\) in a row"):
        images[2]


# --- enormous pictures


@pytest.fixture
def small_limit(monkeypatch):
    """Pillow refuses more than twice as many pixels."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("suffix", ["png", "webp", "gif"])
def test_a_picture_above_the_limit_names_the_key_that_raises_it(tmp_path, small_limit, suffix):
    for n in range(3):
        save(tmp_path / f"{n}.{suffix}", size=(60, 24))
    for limit, said in ((None, "1,000"), (1439, "1,439")):
        images = FolderImages(tmp_path, "train", 8, max_pixels=limit)
        with pytest.raises(ImageError) as error:
            images[0]
        line = f"{images.path(0)}: 1,440 pixels, more than the {said} that a picture may have: data.max_pixels=1440"
        assert str(error.value) == f"{line} takes it; data.on_error=skip passes over such files"
        assert Image.MAX_IMAGE_PIXELS == 500
    assert FolderImages(tmp_path, "train", 8, max_pixels=1440)[0]["image"].shape == (3, 8, 8)
    assert Image.MAX_IMAGE_PIXELS == 500


def test_the_limit_holds_in_workers(tmp_path, small_limit):
    images = noise_images(tmp_path, 4, max_pixels=24 * 60)
    assert len(list(DataLoader(images, batch_size=2, num_workers=1))) == 2
    images.max_pixels = 24 * 60 - 1
    with pytest.raises(ImageError, match=r": data\.max_pixels=1440 takes it; data.on_error") as error:
        list(DataLoader(images, batch_size=2, num_workers=1))
    traceback.clear_frames(error.tb)

"""One array of all images, in a `.npy` or `.npz` file."""

import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from ldm_lab.data.images import FolderImages, ImageError
from ldm_lab.data.storage.archives import open_root
from ldm_lab.utils.errors import UserError
from tests.data.pictures import FIVE_CHANNELS, field


@pytest.fixture
def values():
    return np.stack([field(FIVE_CHANNELS, index) for index in range(12)])


def deep(root, split="train", **arguments):
    return FolderImages(root, split, (24, 36), val_fraction=0.2, channels=5, value_range=[-3, 900], **arguments)


def saved(path, values, order="C"):
    values = np.asarray(values, order=order)
    np.save(path, values) if path.suffix == ".npy" else np.savez(path, images=values, labels=np.arange(len(values)))
    return path


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("name", ["x.npy", "x.npz"])
def test_a_stack_is_a_folder_of_its_arrays(tmp_path, values, name, order):
    path = saved(tmp_path / name, values, order)
    (tmp_path / "folder").mkdir()
    for index, image in enumerate(values):
        np.save(tmp_path / f"folder/{index:09d}.npy", image)
    for split in ("train", "val"):
        stack, folder = deep(path, split), deep(tmp_path / "folder", split)
        assert stack.names.tolist() == folder.names.tolist()
        assert all(torch.equal(stack[i]["image"], folder[i]["image"]) for i in range(len(stack)))


def test_a_stack_is_mapped_not_read(tmp_path, values):
    files = open_root(saved(tmp_path / "x.npz", values))
    assert isinstance(files.array, np.memmap)
    assert len(pickle.dumps(files)) < 1000
    images = deep(files.root)
    loaded = torch.cat([batch["image"] for batch in DataLoader(images, batch_size=3, num_workers=1)])
    assert torch.equal(loaded, torch.stack([images[i]["image"] for i in range(len(images))]))


def test_grey_of_8_bits(tmp_path):
    stack = np.random.default_rng(0).integers(0, 256, (20, 28, 28), np.uint8)
    images = FolderImages(saved(tmp_path / "fashion.npy", stack), "train", 28, channels=1)
    assert images.pixels.is_8_bit
    index = int(images.names[3][:9])
    assert torch.equal(images[3]["image"][0], torch.from_numpy(stack[index]).float() / 127.5 - 1)
    with pytest.raises(
        ImageError, match=r"fashion\.npy/0.*\.npy: 1 channel\(s\), but data\.channels=3: set data.channels=1"
    ):
        FolderImages(tmp_path / "fashion.npy", "train", 28)[0]


def test_the_fingerprint_follows_the_values(tmp_path, values):
    path = saved(tmp_path / "x.npy", values)
    before = deep(path).fingerprint()
    assert before == deep(saved(tmp_path / "y.npy", values)).fingerprint()
    assert len(np.unique(deep(path).marks())) == len(deep(path))
    assert before != deep(saved(tmp_path / "z.npy", values + 1)).fingerprint()


@pytest.mark.parametrize(
    ("stored", "said"),
    [
        (np.zeros((8, 8)), r"holds float64 of shape \(8, 8\); expected numbers of shape \(N, H, W\) or"),
        (np.zeros((2, 8, 8), complex), "holds complex128 of shape"),
        (np.array([{}] * 2), "holds objects, which could run code"),
        (np.zeros((0, 8, 8)), "holds float64 of shape"),
    ],
)
def test_arrays_that_are_no_images_are_refused(tmp_path, stored, said):
    np.save(tmp_path / "x.npy", stored, allow_pickle=True)
    with pytest.raises(UserError, match=rf"^data\.root=.*x\.npy: .*{said}") as error:
        open_root(tmp_path / "x.npy")
    assert "\n" not in str(error.value)


def test_archives_of_arrays_that_are_no_stack_are_refused(tmp_path, values):
    two, packed, none = (tmp_path / f"{name}.npz" for name in ("two", "packed", "none"))
    np.savez(two, train_images=values, val_images=values)
    np.savez_compressed(packed, values)
    np.savez(none, labels=np.zeros(3))
    said = {two: "2 arrays of three or four axes: train_images, val_images; save", packed: "arr_0 is compressed: save"}
    for path, line in {**said, none: "holds 0 arrays of three or four axes; save"}.items():
        with pytest.raises(UserError, match=rf"^data\.root={path}: .*{line}"):
            open_root(path)
    (tmp_path / "cut.npy").write_bytes(saved(tmp_path / "x.npy", values).read_bytes()[:999])
    (tmp_path / "text.npy").write_text("no array")
    for name in ("cut.npy", "text.npy"):
        with pytest.raises(UserError, match=r"^data\.root=.*: cannot be read: "):
            open_root(tmp_path / name)

"""Images as evaluation sees them: exactly the loader's, and files that may be anything."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from ldm_lab.data.drawn import DrawnImages
from ldm_lab.metrics.images import ArrayPixels, DataPixels, FilePixels, WholeFolder
from ldm_lab.sampling.files import RGB_PNG
from ldm_lab.utils.reading import LoadError
from tests.helpers import Malicious


def pictures(count, size=(6, 8)):
    return np.random.default_rng(0).integers(0, 256, (count, *size, 3), dtype=np.uint8)


def test_images_of_a_data_set_are_the_loader_s_to_the_bit():
    data = DrawnImages("train", 16, num_train=5, flip=True)
    pixels = DataPixels(data, "drawn")
    for index in range(5):
        assert torch.equal(pixels[index].float() / 127.5 - 1, data[index]["image"])
        assert np.array_equal(pixels[index].permute(1, 2, 0).numpy(), np.asarray(data.read(index)))
    assert pixels.size == (16, 16)
    with pytest.raises(IndexError):
        pixels[5]


def test_some_of_a_data_set_are_spread_over_it_and_have_another_fingerprint():
    data = DrawnImages("train", 16, num_train=10)
    some = DataPixels(data, "drawn", most=4)
    assert [some.index(place) for place in range(4)] == [0, 2, 5, 7]
    assert len(DataPixels(data, "drawn", most=99)) == 10
    assert some.fingerprint() != DataPixels(data, "drawn").fingerprint()


def test_samples_are_read_as_they_are(tmp_path):
    array = pictures(3)
    paths = [tmp_path / f"{index}.png" for index in range(3)]
    for path, picture in zip(paths, array, strict=True):
        Image.fromarray(picture).save(path)
    files = FilePixels(paths, "samples", "a model", RGB_PNG.read)
    assert np.array_equal(torch.stack([files[i] for i in range(3)]).permute(0, 2, 3, 1).numpy(), array)
    assert files.size == (6, 8)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_are_read_compressed_or_not_and_in_other_processes(tmp_path, save):
    array = pictures(5)
    save(tmp_path / "samples.npz", arr_0=array, more=np.zeros(3))
    images = ArrayPixels(tmp_path / "samples.npz", most=4)
    for one in (images, pickle.loads(pickle.dumps(images))):
        assert len(one) == 4
        assert np.array_equal(one[3].permute(1, 2, 0).numpy(), array[3])
    assert images.fingerprint() != ArrayPixels(tmp_path / "samples.npz").fingerprint()


def test_arrays_that_are_no_images_end_in_one_line(tmp_path):
    path = tmp_path / "samples.npz"
    for arrays in ({"arr_0": np.zeros((4, 6, 8, 3))}, {"arr_0": pictures(4)[..., :2]}, {"other": pictures(4)}):
        np.savez(path, **arrays)
        with pytest.raises(LoadError, match="arr_0"):
            ArrayPixels(path)
    path.write_bytes(b"nothing")
    with pytest.raises(LoadError, match=r"samples\.npz"):
        ArrayPixels(path)


def test_objects_in_an_array_are_never_unpickled(tmp_path):
    path = tmp_path / "samples.npz"
    for save in (np.savez, np.savez_compressed):
        save(path, arr_0=np.array([Malicious(tmp_path / "run")], dtype=object))
        with pytest.raises(LoadError):
            ArrayPixels(path)
    assert not (tmp_path / "run").exists()


def test_of_a_whole_folder_nothing_is_held_out(tmp_path):
    for index, picture in enumerate(pictures(6)):
        Image.fromarray(picture).save(tmp_path / f"{index}.png")
    folder = WholeFolder(tmp_path, 4)
    assert len(folder) == 6
    assert folder[0]["image"].shape == (3, 4, 4)
    (tmp_path / "one").mkdir()
    Image.fromarray(pictures(1)[0]).save(tmp_path / "one/a.png")
    with pytest.raises(ValueError, match="two are the least"):
        len(WholeFolder(tmp_path / "one", 4))

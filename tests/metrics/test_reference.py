"""Statistics of real images: kept with what they are of, and refused where that is something else."""

import numpy as np
import pytest
import torch
from torch import nn

from ldm_lab.data.drawn import DrawnImages
from ldm_lab.metrics import reference
from ldm_lab.metrics.extractors import Extractor
from ldm_lab.metrics.images import DataPixels
from ldm_lab.metrics.reference import Reference
from ldm_lab.utils.reading import LoadError


class Means(Extractor):
    """Three features: the mean of each channel."""

    name, distance, dimension = "means", "fd_means", 3

    def __init__(self, seed=0):
        super().__init__()
        self.seed = nn.Parameter(torch.tensor(float(seed)))

    def forward(self, images):
        return images.float().mean((2, 3))


def images(size=16):
    return DataPixels(DrawnImages("train", size, num_train=9), "drawn")


def made(extractor):
    pictures = images()
    features = extractor(torch.stack([pictures[i] for i in range(9)]))
    return Reference(reference.header(pictures, extractor), features)


def test_what_is_saved_is_read_again(tmp_path):
    saved = made(Means())
    saved.save(tmp_path / "real.npz")
    read = reference.load(tmp_path / "real.npz", Means(), images().transform())
    assert read.header == saved.header
    assert torch.equal(read.features, saved.features)
    with np.load(tmp_path / "real.npz", allow_pickle=False) as arrays:
        assert np.allclose(arrays["mu"], saved.features.double().mean(0).numpy())
        assert np.allclose(arrays["sigma"], np.cov(saved.features.double().numpy(), rowvar=False))


def test_statistics_of_something_else_end_in_one_line(tmp_path):
    path = tmp_path / "real.npz"
    made(Means()).save(path)
    wrong = {
        "extractor": (Means(seed=1), images().transform()),
        "transform.image_size": (Means(), images(32).transform()),
        "transform.crop": (Means(), {**images().transform(), "crop": "none"}),
    }
    for named, (extractor, transform) in wrong.items():
        with pytest.raises(LoadError, match=f"real.npz: other statistics: {named} is") as error:
            reference.load(path, extractor, transform)
        assert "\n" not in str(error.value)


def test_files_of_the_adm_evaluator_are_of_inception_alone(tmp_path):
    path = tmp_path / "VIRTUAL.npz"
    np.savez(path, mu=np.zeros(3), sigma=np.eye(3), mu_s=np.zeros(2), sigma_s=np.eye(2))
    with pytest.raises(LoadError, match="--features inception"):
        reference.load(path, Means(), {})
    inception = Means()
    inception.distance = "fid"
    read = reference.load(path, inception, {})
    assert read.features is None
    assert read.gaussian.covariance.tolist() == np.eye(3).tolist()
    inception.dimension = 4
    with pytest.raises(LoadError, match="features of Inception"):
        reference.load(path, inception, {})


@pytest.mark.parametrize("arrays", [{"other": np.zeros(3)}, {"header": np.array("[]")}, {"header": np.array("{")}])
def test_what_is_no_statistics_file_ends_in_one_line(tmp_path, arrays):
    np.savez(tmp_path / "real.npz", **arrays)
    with pytest.raises(LoadError, match=r"real\.npz"):
        reference.load(tmp_path / "real.npz", Means(), {})
    (tmp_path / "real.npz").write_bytes(b"PK")
    with pytest.raises(LoadError, match=r"no \.npz"):
        reference.load(tmp_path / "real.npz", Means(), {})

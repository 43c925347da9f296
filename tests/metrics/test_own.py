"""The extractor that is trained on the data set itself."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ldm_lab.data import drawing
from ldm_lab.data.avatars import AvatarImages
from ldm_lab.data.drawn import DrawnImages
from ldm_lab.metrics import own
from ldm_lab.metrics.distribution import frechet_distance, gaussian
from ldm_lab.metrics.images import DataPixels
from ldm_lab.utils.reading import LoadError

CPU = torch.device("cpu")


def drawn(count, size=32, seed=0):
    return DataPixels(DrawnImages("train", size, num_train=count, drawing_seed=seed), "drawn")


@pytest.fixture
def steps(monkeypatch):
    """Shortens the training."""
    return lambda count: monkeypatch.setattr(own, "STEPS", count)


def test_the_distance_grows_with_what_is_wrong(tmp_path, steps):
    steps(10)
    extractor = own.own(drawn(256), tmp_path, CPU)
    real, other = (torch.stack([part[i] for i in range(len(part))]) for part in (drawn(1024), drawn(1024, seed=1)))
    reference = gaussian(extractor(real))
    noise = torch.randn(other.shape, generator=torch.Generator().manual_seed(0))

    def distance(images):
        return frechet_distance(gaussian(extractor(images.clamp(0, 255).round().to(torch.uint8))), reference)

    held_out = distance(other.float())
    noisy = [distance(other + strength * noise) for strength in (20, 40, 80)]
    blurred = [distance(F.avg_pool2d(other.float(), size, 1, size // 2)) for size in (3, 5, 9)]
    bright = other[other.float().mean((1, 2, 3)).argsort()[512:]]  # the other half of the modes is missing
    for worse in (noisy, blurred, [distance(bright.float())]):
        assert [held_out, *worse] == sorted([held_out, *worse])
        assert worse[-1] > 5 * held_out


def test_it_is_a_function_of_images_and_seed_and_disturbs_nobody(tmp_path, steps):
    steps(3)
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    made = [own.own(drawn(8), tmp_path / str(place), CPU, seed) for place, seed in enumerate((0, 0, 1))]
    assert torch.rand(1) == expected
    one, again, other = (extractor.fingerprint() for extractor in made)
    assert one == again != other
    assert not any(parameter.requires_grad for parameter in made[0].parameters())


def test_it_is_trained_once(tmp_path, steps, monkeypatch):
    steps(2)
    made = own.own(drawn(8), tmp_path, CPU)
    monkeypatch.setattr(own, "trained", None)
    assert own.own(drawn(8), tmp_path, CPU).fingerprint() == made.fingerprint()
    assert own.kept(tmp_path, made.fingerprint()).fingerprint() == made.fingerprint()
    assert own.kept(tmp_path, "another") is None
    with pytest.raises(TypeError):  # other images have another one
        own.own(drawn(9), tmp_path, CPU)


def test_a_damaged_one_ends_in_one_line(tmp_path, steps):
    steps(2)
    own.own(drawn(8), tmp_path, CPU)
    (path,) = own.folder(tmp_path).glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(LoadError, match="remove it"):
        own.own(drawn(8), tmp_path, CPU)


def test_features_of_the_images_it_has_learned_are_standardized(tmp_path, steps):
    steps(2)
    images = drawn(40)
    features = own.own(images, tmp_path, CPU)(torch.stack([images[i] for i in range(40)]))
    assert features.shape == (40, own.Own.dimension)
    assert torch.allclose(features.mean(0), torch.zeros(1), atol=1e-4)
    assert torch.allclose(features.std(0), torch.ones(1), atol=1e-2)


def test_larger_images_are_averaged_down_and_smaller_ones_stay():
    assert own.seen(torch.zeros(1, 3, 256, 128, dtype=torch.uint8)).shape == (1, 3, 64, 64)
    assert own.seen(torch.zeros(1, 3, 32, 48, dtype=torch.uint8)).shape == (1, 3, 32, 48)
    checks = torch.tensor([[0, 255], [255, 0]], dtype=torch.uint8).repeat(1, 3, 64, 64)
    assert torch.allclose(own.seen(checks), torch.zeros(1), atol=1e-6)


def test_of_avatars_it_learns_what_was_drawn(tmp_path, steps):
    steps(2)
    data = AvatarImages("val", tmp_path, 32, num_train=100, num_val=12, drawing_seed=3)
    data.__dict__["drawings"] = np.random.default_rng(0).integers(0, 256, (112, 32, 32, 3), dtype=np.uint8)
    images = DataPixels(data, "avatars")
    avatar = drawing.compose(random.Random("avatar/3/105"))
    (labels,) = own.avatar_labels(images, [5])
    assert drawing.TOPS[labels[0]] is avatar.top
    assert (drawing.pa.AccessoryType.NONE, *drawing.GLASSES)[labels[4]] is avatar.accessory
    assert drawing.FABRIC_COLORS[labels[9]] is avatar.clothing_color
    extractor = own.own(images, tmp_path, CPU)
    assert (extractor.name, extractor.distance) == ("avatars", "fd_avatars")

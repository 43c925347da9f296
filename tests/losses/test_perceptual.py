from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import pytest
import torch
import torchvision
from torch import nn
from torchmetrics.functional.image.lpips import _LPIPS

from ldm_lab.losses.perceptual import LPIPS, MultiScaleL1
from tests.helpers import assert_close_relative


def pair(size=32, batch=2):
    torch.manual_seed(1)
    target = torch.rand(batch, 3, size, size) * 2 - 1
    return (target + 0.3 * torch.randn_like(target)).clamp(-1, 1), target


@pytest.fixture(scope="module")
def vgg():
    """The state dict of VGG16's features with random weights that keep the size of the activations."""
    with torch.device("meta"):
        shapes = torchvision.models.vgg16().features.state_dict()
    torch.manual_seed(0)
    return {
        f"features.{key}": torch.randn(value.shape) * (2 / value[0].numel()) ** 0.5
        if value.ndim == 4
        else 0.1 * torch.randn(value.shape)
        for key, value in shapes.items()
    }


@pytest.fixture(scope="module")
def weights(vgg, tmp_path_factory):
    path = tmp_path_factory.mktemp("vgg") / "vgg16-397923af.pth"
    torch.save({**vgg, "classifier.0.weight": torch.zeros(2, 2)}, path)
    return path


@pytest.fixture(scope="module")
def lpips(weights):
    return LPIPS(weights)


@pytest.fixture
def reference(vgg, monkeypatch):
    with torch.device("meta"):
        features = torchvision.models.vgg16().features
    features.load_state_dict({key.removeprefix("features."): value for key, value in vgg.items()}, assign=True)
    monkeypatch.setattr(torchvision.models, "vgg16", lambda weights: SimpleNamespace(features=features))
    return _LPIPS(net="vgg", pnet_rand=True)


def test_lpips_and_its_gradient_equal_those_of_torchmetrics(lpips, reference):
    reconstruction, target = pair()
    mine, theirs = (reconstruction.clone().requires_grad_() for _ in range(2))
    distance, expected = lpips(mine, target), reference(theirs, target).flatten()
    assert distance.shape == (2,)
    assert_close_relative(distance.detach(), expected.detach(), 1e-5)
    distance.sum().backward()
    expected.sum().backward()
    assert_close_relative(mine.grad, theirs.grad, 1e-4)


def test_lpips_of_equal_images_is_zero_and_images_do_not_mix(lpips):
    reconstruction, target = pair()
    assert lpips(target, target).abs().max() == 0
    assert_close_relative(lpips(reconstruction[1:], target[1:]), lpips(reconstruction, target)[1:], 1e-5)


def test_lpips_repeats_a_single_channel(lpips):
    grey = [images[:, :1] for images in pair()]
    rgb = [images.expand(-1, 3, -1, -1) for images in grey]
    assert torch.equal(lpips(*grey), lpips(*rgb))


def test_lpips_is_no_part_of_checkpoints_or_optimizers(lpips):
    lpips(*pair())
    owner = nn.ModuleDict({"perceptual": lpips, "network": nn.Linear(2, 2)})
    assert set(owner.state_dict()) == {"network.weight", "network.bias"}
    assert len(list(owner.parameters())) == 2
    owner.load_state_dict(owner.state_dict())  # strict: no tensor of VGG16 is expected


def test_lpips_is_frozen_and_stays_so_in_training(lpips):
    lpips.setup()
    nn.ModuleList([lpips]).train().requires_grad_(True)
    network = lpips._networks[0]
    assert not any(p.requires_grad for p in network.parameters())
    assert not any(part.training for part in network.modules())


def test_lpips_loads_its_network_once_and_not_before_it_is_needed(weights, monkeypatch):
    read, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda path, **kwargs: read.append(kwargs) or load(path, **kwargs))
    with torch.device("meta"):
        lpips = LPIPS(weights)
    assert not read
    for _ in range(2):
        lpips(*pair(16))
    assert len(read) == 2  # VGG16 and the heads
    assert all(kwargs["weights_only"] for kwargs in read)


def test_lpips_trains_after_a_first_use_in_validation(weights):
    lpips = LPIPS(weights)
    reconstruction, target = pair(16)
    with torch.inference_mode():
        lpips(reconstruction, target)
    lpips(reconstruction.requires_grad_(), target).sum().backward()
    assert reconstruction.grad.abs().max() > 0


def test_lpips_goes_to_the_device_of_the_images(weights):
    assert LPIPS(weights)(*(images.to("meta") for images in pair(16))).device.type == "meta"


def test_lpips_under_autocast_is_float32_and_close(lpips):
    reconstruction, target = pair()
    expected = lpips(reconstruction, target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = lpips(reconstruction, target)
    assert actual.dtype == torch.float32
    assert_close_relative(actual, expected, 0.02)


def test_lpips_takes_the_features_alone(vgg, lpips, tmp_path):
    path = tmp_path / "features.pth"
    torch.save({key.removeprefix("features."): value for key, value in vgg.items()}, path)
    assert torch.equal(LPIPS(path)(*pair(16)), lpips(*pair(16)))


def test_lpips_finds_the_file_in_the_cache_of_the_hub(weights, lpips, tmp_path, monkeypatch):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / weights.name).hardlink_to(weights)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    assert torch.equal(LPIPS()(*pair(16)), lpips(*pair(16)))


def test_lpips_without_download_says_what_to_set(tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise URLError("no route to host")

    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    monkeypatch.setattr(torch.hub, "urlopen", offline)
    with pytest.raises(ValueError, match=r"no route.*model\.loss\.perceptual\.weights=/path/to/vgg16-397923af\.pth"):
        LPIPS().setup()


def write_nothing(path):
    pass


def write_garbage(path):
    path.write_bytes(b"not a file of torch")


def write_code(path):
    torch.save({"features.0.weight": Path}, path)


def write_another_network(path):
    torch.save(nn.Linear(2, 2).state_dict(), path)


def write_a_tensor(path):
    torch.save(torch.zeros(3), path)


@pytest.mark.parametrize(
    "write", [write_nothing, write_garbage, write_code, write_another_network, write_a_tensor], ids=lambda f: f.__name__
)
def test_lpips_refuses_other_files_in_one_line(write, tmp_path):
    path = tmp_path / "weights.pth"
    write(path)
    with pytest.raises(ValueError, match=r"model\.loss\.perceptual\.weights=.*weights\.pth.*vgg16-397923af") as error:
        LPIPS(path).setup()
    assert "\n" not in str(error.value)


def test_multi_scale_l1_of_a_constant_offset_is_the_offset():
    _, target = pair()
    offsets = torch.tensor([0.5, -0.25]).view(2, 1, 1, 1)
    assert_close_relative(MultiScaleL1()(target + offsets, target), torch.tensor([0.5, 0.25]), 1e-5)


def test_multi_scale_l1_of_a_checkerboard_lies_in_the_finest_level():
    rows = torch.arange(16)
    board = (-1.0) ** (rows[:, None] + rows).expand(1, 3, 16, 16)
    # Level 0: |±1| = 1 and both gradients are 2; the coarser levels average it away.
    assert MultiScaleL1(levels=3)(board, torch.zeros_like(board)).item() == pytest.approx((1 + 2 + 2) / 3)


def test_multi_scale_l1_counts_coarse_errors_on_every_level():
    target = torch.zeros(1, 3, 32, 32)
    coarse, fine = target.clone(), target.clone()
    coarse[..., :8, :] = 1  # as many wrong pixels, in one piece ...
    fine[..., ::4, :] = 1  # ... and in lines
    plain = MultiScaleL1(levels=1)
    assert plain(fine, target) > plain(coarse, target)
    assert MultiScaleL1(levels=3)(coarse, target).item() == pytest.approx(0.25 + (1 / 31 + 1 / 15 + 1 / 7) / 3)


def test_multi_scale_l1_under_autocast_is_float32():
    reconstruction, target = pair()
    expected = MultiScaleL1()(reconstruction, target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(MultiScaleL1()(reconstruction, target), expected)
    assert MultiScaleL1()(reconstruction.bfloat16(), target.bfloat16()).dtype == torch.float32

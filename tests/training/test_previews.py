"""What training shows beside its samples: how they come about, what raw weights make of them, what they are like."""

from types import SimpleNamespace

import pytest
import torch

from ldm_lab.data.drawn import DrawnImages
from ldm_lab.pipeline import LDMPipeline
from ldm_lab.training.callbacks import denoising_strip, pictures, sample_grid
from ldm_lab.training.callbacks.denoising_strip import DenoisingStrip
from ldm_lab.training.callbacks.sample_grid import SampleGrid
from ldm_lab.training.neighbours import Neighbours
from tests.helpers import GOLDEN, assert_close_relative
from tests.training.stages import tiny

ONE = SimpleNamespace(
    global_rank=0, world_size=1, precision="32-true", strategy=SimpleNamespace(root_device=torch.device("cpu"))
)


@pytest.fixture
def shown(monkeypatch):
    """Name -> images of what a callback shows."""
    found = {}

    def show(trainer, module, folder, name, images, columns=None):
        found[name] = (images, columns)

    for place in (sample_grid, denoising_strip):
        monkeypatch.setattr(place, "show", show)
    return found


# --- the strip


@pytest.mark.parametrize("sampler", ["ddim", "dpm_solver"])
def test_the_strip_ends_where_the_grid_ends(shown, tmp_path, sampler):
    """Its last frame is the sample of the same number: the last step ends at what it takes for clean."""
    module = SimpleNamespace(
        device=torch.device("cpu"), pipeline=lambda: LDMPipeline.from_pretrained(GOLDEN / "diffusers" / "ldm_tiny")
    )
    settings = {"steps": 5, "seed": 3, "sampler": sampler}
    SampleGrid(tmp_path, 8, images=3, **settings).sample(ONE, module)
    DenoisingStrip(tmp_path, 8, images=2, frames=3, **settings).sample(ONE, module)
    frames, columns = shown["denoising"]
    assert columns == 3
    frames = frames.unflatten(0, (2, 3)).clamp(-1, 1)  # (n, F, 3, H, W)
    assert (frames[:, 0] - frames[:, -1]).abs().max() > 0.01
    if module.pipeline().scheduler.config.set_alpha_to_one or sampler == "dpm_solver":
        assert_close_relative(frames[:, -1], shown["samples"][0][:2])


# --- weights that are not averaged


def test_raw_samples_are_those_of_the_raw_weights_and_training_notices_nothing(shown, tmp_path):
    module = tiny("celebahq/diffusion")[0]
    module.unet.register_to_config(sample_size=8)
    module.ema.model.register_to_config(sample_size=8)
    module.train()
    grid = SampleGrid(tmp_path, 8, images=3, raw=2, steps=2)
    grid.sample(ONE, module)
    assert torch.equal(shown["samples_raw"][0], shown["samples"][0][:2])  # the average begins with the weights
    with torch.no_grad():
        module.unet.conv_out.bias.add_(1)
    grid.sample(ONE, module)
    raw, averaged = shown["samples_raw"][0], shown["samples"][0][:2]
    assert (raw - averaged).abs().max() > 1e-3
    assert module.unet.training
    assert not module.ema.training
    module.ema.model.load_state_dict(module.unet.state_dict())
    grid.sample(ONE, module)
    assert torch.equal(shown["samples"][0][:2], raw)


# --- neighbours


def trainer_of(images, world_size=1, rank=0):
    data = SimpleNamespace(train_set=images, num_train=len(images), loading=dict)
    return SimpleNamespace(**{**vars(ONE), "datamodule": data, "world_size": world_size, "global_rank": rank})


def test_a_copy_is_found_also_where_it_is_mirrored_or_noisy():
    images = DrawnImages("train", 32, flip=True)
    originals = torch.stack([images[index]["image"] for index in (5, 11)])
    noise = 0.05 * torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    samples = torch.cat([originals + noise, originals.flip(-1), torch.zeros(1, 3, 32, 32)])
    rows = Neighbours(samples=4, nearest=2, among=len(images)).beside(trainer_of(images), samples)
    assert rows.shape == (4, 3, 3, 32, 32)
    assert torch.equal(rows[:, 0], samples[:4].clamp(-1, 1))
    assert torch.equal(rows[:2, 1], originals)
    assert torch.equal(rows[2:, 1], originals.flip(-1))  # shown as it was found
    assert not torch.equal(rows[:2, 2], originals)


def test_only_so_many_are_read_and_once(monkeypatch):
    images, read = DrawnImages("train", 32), []
    monkeypatch.setattr(images, "read", lambda index, own=images.read: read.append(index) or own(index))
    neighbours = Neighbours(samples=1, nearest=1, among=8)
    for _ in range(2):
        neighbours.beside(trainer_of(images), torch.zeros(3, 3, 32, 32))
    assert len(read) == 8 + 2
    assert len(set(read)) == 8
    assert max(read) > len(images) // 2  # spread over all


def test_ranks_read_shares_and_find_the_same(monkeypatch):
    images, shares, found = DrawnImages("train", 32), [], []

    def all_gather(parts, mine):
        for part, share in zip(parts, [*shares, mine], strict=False):
            part.copy_(share)
        shares.append(mine)

    monkeypatch.setattr(torch.distributed, "all_gather", all_gather)
    samples = torch.stack([images[index]["image"] for index in range(3)])
    alone = Neighbours(samples=3, among=7).beside(trainer_of(images), samples)
    for rank in range(3):
        found.append(Neighbours(samples=3, among=7).beside(trainer_of(images, 3, rank), samples))
    assert [len(share) for share in shares] == [3, 3, 3]
    assert torch.equal(found[-1], alone)  # on the last rank, when all have read


def test_rows_of_frames_are_shared_too(monkeypatch):
    rows = torch.arange(5 * 2 * 3).float().view(5, 2, 3, 1, 1)
    assert torch.equal(pictures.shared(ONE, 5, lambda indices: rows[list(indices)]), rows)

from itertools import islice
from types import SimpleNamespace

import lightning
import pytest
import torch

from ldm_lab.data.datamodule import ImageDataModule
from ldm_lab.data.drawn import DrawnImages
from ldm_lab.data.images import FolderImages
from ldm_lab.utils.errors import UserError
from ldm_lab.utils.pixels import RGB_8_BIT, PixelFormat
from tests.data.pictures import save


def module(rank=0, world_size=1, device="cpu", num_train=10, num_val=7, **arguments):
    sets = [DrawnImages(s, 8, num_train, num_val, flip=s == "train", seed=3) for s in ("train", "val")]
    data = ImageDataModule(*sets, **{"global_batch_size": 12, "seed": 3, **arguments})
    data.trainer = SimpleNamespace(
        global_rank=rank, world_size=world_size, strategy=SimpleNamespace(root_device=torch.device(device))
    )
    return data


def train_batches(data, count):
    return list(islice(data.train_dataloader(), count))


def test_batches_are_images_with_their_places():
    data = module()
    batch = train_batches(data, 1)[0]
    assert batch["image"].shape == (12, 3, 8, 8)
    assert batch["image"].dtype == torch.float32
    assert batch["position"].tolist() == list(range(12))
    for n in (0, 7):
        item = data.train_set[int(batch["index"][n]), n]
        assert torch.equal(batch["image"][n], item["image"])


def test_both_data_sets_have_one_format():
    data = module()
    assert data.pixels == RGB_8_BIT == data.val_set.pixels
    data.val_set.pixels = PixelFormat(1, (0, 65535))
    with pytest.raises(UserError, match=r"images of 3 channel.s. from 0 to 255 for training but of 1 .* to 65535 held"):
        _ = data.pixels


def test_workers_change_nothing():
    alone, helped = train_batches(module(), 3), train_batches(module(num_workers=2), 3)
    for one, other in zip(alone, helped, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in ("image", "index", "position"))


def test_ranks_and_accumulation_share_the_global_batch():
    whole = train_batches(module(), 1)[0]
    parts = [b for rank in range(2) for b in train_batches(module(rank, 2, batch_size=3), 2)]
    assert module(batch_size=3).accumulation(2) == 2
    images = {int(n): image for b in parts for n, image in zip(b["position"], b["image"], strict=True)}
    assert all(torch.equal(images[n], whole["image"][n]) for n in range(12))


def test_batch_size_defaults_to_the_share_of_a_device():
    assert [module().device_batch_size(world) for world in (1, 2, 4)] == [12, 6, 3]
    assert [module().accumulation(world) for world in (1, 2, 4)] == [1, 1, 1]
    for world in (5, 24):
        with pytest.raises(ValueError, match=f"on {world} device"):
            module(world_size=world, num_val=99).setup("fit")


def test_what_there_is_is_said_once_by_the_first_process(tmp_path, capsys):
    for n in range(40):
        save(tmp_path / f"{n}.png")
    for name in ("a.txt", "b.txt", "c.TXT", "d.json", "e.npy", "f.md", "g.html", "h.xyz", "README", ".hidden", "i.txt"):
        (tmp_path / name).touch()
    sets = [FolderImages(tmp_path, split, 8, val_fraction=0.2) for split in ("train", "val")]
    for rank in (1, 0, 0):
        data = ImageDataModule(*sets, global_batch_size=4)
        data.trainer = module(rank, world_size=2).trainer
        data.setup("fit")
    said = capsys.readouterr().out
    images = f"images: {len(sets[0])} for training, {len(sets[1])} held out"
    assert said.startswith(f"{images}; passed over: 4 .txt files, 1 .json files, ")
    assert said.endswith(" and 3 more\n")
    assert said.count("\n") == 1
    assert module().census() == "images: 10 for training, 7 held out"


def test_resuming_continues_the_stream():
    whole = train_batches(module(), 4)
    resumed = module()
    resumed.images_seen = 24
    for one, other in zip(train_batches(resumed, 2), whole[2:], strict=True):
        assert all(torch.equal(one[key], other[key]) for key in ("image", "index", "position"))


@pytest.mark.parametrize(("world_size", "each"), [(1, 7), (2, 3), (3, 2), (7, 1)])
def test_validation_shares_are_equal_and_disjoint(world_size, each):
    shares = []
    for rank in range(world_size):
        loader = module(rank, world_size, val_batch_size=2).val_dataloader()[0]
        shares.append(torch.cat([batch["index"] for batch in loader]).tolist())
    assert [len(share) for share in shares] == [each] * world_size
    assert shares[0] == list(range(0, each * world_size, world_size))
    assert sorted(index for share in shares for index in share) == list(range(each * world_size))


def test_too_few_held_out_images_are_refused():
    with pytest.raises(ValueError, match="1 held-out images for 2 devices"):
        module(world_size=2, num_val=1).setup("fit")


def test_preview_is_the_first_held_out_images():
    data = module()
    assert data.preview(4).shape == (4, 3, 8, 8)
    assert data.preview(100).shape == (7, 3, 8, 8)
    assert torch.equal(data.preview(2)[1], data.val_set[1]["image"])


def test_memory_is_pinned_for_cuda_alone():
    assert not module().train_dataloader().pin_memory
    assert module(device="cuda").train_dataloader().pin_memory


class Recorder(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.positions, self.validated = [], []

    def training_step(self, batch):
        self.positions += batch["position"].tolist()
        return self.weight * batch["image"].mean()

    def validation_step(self, batch):
        self.validated += batch["index"].tolist()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_lightning_takes_the_endless_loader(tmp_path):
    data, recorder = module(batch_size=4), Recorder()
    data.trainer = None
    data.images_seen = 24
    trainer = lightning.Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        max_steps=2,
        accumulate_grad_batches=data.accumulation(1),
        val_check_interval=3,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(recorder, data)
    assert trainer.global_step == 2
    assert recorder.positions == list(range(24, 48))
    assert recorder.validated == [*range(7), *range(7)]

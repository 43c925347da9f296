"""Training from and with a store: images read archive by archive, several ranks, and latents of other machines."""

import shutil
from pathlib import Path

import pytest

from ldm_lab.training.callbacks import encode
from tests.data.pictures import save
from tests.data.test_remote import pack_files
from tests.reliability import kills
from tests.trained import metrics, train
from tests.training.test_resume import assert_same_training, interrupt

STAGE = Path("avatars/autoencoder")
COUNT, ARCHIVES = 48, 6


@pytest.fixture
def archives(tmp_path, s3):
    """A set of archives in a store: the setting `data.root`, and the bytes of the largest archive."""
    for n in range(COUNT):
        save(tmp_path / "photos" / f"{n:02}.png", (5 * n, 255 - 5 * n, n), (32, 32 + n % 3), format="PNG")
    names = sorted(path.name for path in (tmp_path / "photos").iterdir())
    for n in range(ARCHIVES):
        pack_files(tmp_path / "photos", tmp_path / f"sets/s-{n}.tar", names[n::ARCHIVES], "")
    largest = max(path.stat().st_size for path in (tmp_path / "sets").iterdir())
    return f"data.root={s3.put_folder(tmp_path / 'sets', 'training')}/s-{{0..{ARCHIVES - 1}}}.tar", largest


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.soak)])
def test_a_run_that_reads_archive_by_archive_resumes_exactly(workers, archives, tmp_path):
    """On another machine, which has none of the archives; the limit holds half of them, the order comes back."""
    root, largest = archives
    order = ["data.order=shards", "data.shard_window=1", f"paths.cache_limit={3 * largest}", "data.val_fraction=0.2"]
    own = ["experiment=avatars/autoencoder", root, *order, f"data.num_workers={workers}", "max_images=96"]
    train(tmp_path / "whole", *own, f"paths.cache={tmp_path / 'a'}")
    copies = list((tmp_path / "a/stores").rglob("*.tar"))
    assert 0 < len(copies) <= 3
    with pytest.raises(SystemExit):
        train(tmp_path / "parts", *own, f"paths.cache={tmp_path / 'b'}", *interrupt("autoencoder", 40))
    shutil.rmtree(tmp_path / "b")
    train(tmp_path / "parts", *own, f"paths.cache={tmp_path / 'b'}")
    assert_same_training(tmp_path / "parts" / STAGE, tmp_path / "whole" / STAGE)


def test_two_machines_train_on_the_same_latents(tiny_runs, tmp_path, s3, monkeypatch):
    """The second encodes nothing, and both train as without a store."""
    settings = ("experiment=celebahq/diffusion", f"autoencoder={tiny_runs}/celebahq")
    train(tmp_path / "alone", *settings, f"paths.cache={tmp_path / 'own'}")
    monkeypatch.setenv("LDM_LAB_CACHE", str(tmp_path / "one"))
    train(tmp_path / "one", *settings, "paths.cache=s3://photos/cache")
    assert len(s3.names("cache/latents")) == 1 + len(list((tmp_path / "one/latents").rglob("*.safetensors")))
    monkeypatch.setenv("LDM_LAB_CACHE", str(tmp_path / "two"))
    monkeypatch.setattr(encode.Encoder, "__call__", None)
    train(tmp_path / "two", *settings, "paths.cache=s3://photos/cache")
    for place in ("one", "two"):
        assert_same_training(tmp_path / place / "celebahq/diffusion", tmp_path / "alone/celebahq/diffusion")


def test_a_cache_that_cannot_be_written_is_heard_of_before_stage_1(tmp_path, s3):
    with pytest.raises(ValueError, match=r"^paths\.cache=s3://nowhere/cache/started: no such bucket"):
        train(tmp_path, "experiment=celebahq", "paths.cache=s3://nowhere/cache")
    assert not (tmp_path / "celebahq").exists()
    with pytest.raises(ValueError, match=r"^ftp://host/cache: no such kind of store; there are s3"):
        train(tmp_path, "experiment=celebahq", "paths.cache=ftp://host/cache")


@pytest.mark.soak
@pytest.mark.slow
def test_two_ranks_on_a_store_train_as_on_a_folder(archives, tmp_path):
    root, _ = archives
    several = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "debug=tiny", "logger=csv")
    own = ["experiment=avatars", "data.val_fraction=0.2", *several]
    places = {"store": root, "here": f"data.root={tmp_path / 'photos'}"}
    for runs, place in places.items():
        kills.start(tmp_path / runs, [*own, place, f"paths.cache={tmp_path / 'cache' / runs}"], world_size=2)
    for stage in ("autoencoder", "diffusion"):
        assert_same_training(*(tmp_path / runs / "avatars" / stage for runs in places))
    assert metrics(tmp_path / "store/avatars/diffusion")

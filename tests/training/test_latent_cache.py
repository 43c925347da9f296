"""Stage 2 on cached latents: the same training as on images, encoded once, whoever is interrupted."""

import math
import re

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ldm_lab.data.drawn import DrawnImages
from ldm_lab.data.images import FolderImages
from ldm_lab.data.latents import LatentCache
from ldm_lab.models.autoencoders import load_autoencoder
from ldm_lab.models.kl_model import AutoencoderKL
from ldm_lab.models.vq_model import VQModel
from ldm_lab.training.callbacks import encode as encoding
from ldm_lab.training.latents import latent_cache
from ldm_lab.training.planning import plan
from ldm_lab.training.planning.estimate import estimate
from ldm_lab.training.planning.trial import Trial
from ldm_lab.utils.reading import read_json
from tests.reliability import kills
from tests.trained import metrics, train, undisturbed
from tests.training.stages import tiny

SMALL = {"block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": 2}
SMALL |= {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}


@pytest.fixture
def cached(monkeypatch, tmp_path):
    """Paths of the caches of one test, and of the shards in them."""
    monkeypatch.setenv("LDM_LAB_CACHE", str(tmp_path / "cache"))
    return lambda: sorted((tmp_path / "cache/latents").glob("*/*.safetensors"))


@pytest.fixture
def photos(tmp_path):
    """Pictures, of which one cannot be decoded."""
    (tmp_path / "photos").mkdir()
    for number in range(30):
        Image.effect_noise((40, 36), 20 + number).convert("RGB").save(tmp_path / f"photos/{number}.png")
    (tmp_path / "photos/7.png").write_bytes(b"no picture")
    return tmp_path / "photos"


def stage_2(runs, tiny_runs, experiment="celebahq", *overrides):
    """Train stage 2 on the autoencoder of a tiny run; its losses."""
    train(runs, f"experiment={experiment}/diffusion", f"autoencoder={tiny_runs}/{experiment}", *overrides)
    rows = metrics(runs / experiment / "diffusion")
    return [rows[images]["train/loss"] for images in sorted(rows) if "train/loss" in rows[images]]


@pytest.mark.parametrize("kind", [VQModel, AutoencoderKL])
def test_latents_are_made_of_moments(kind):
    torch.manual_seed(0)
    model = kind(**SMALL).eval()
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    noise = torch.randn(2, 2, 8, 8) if model.draws_latents else None
    moments = model.moments(images)
    assert moments.shape == (2, 4 if model.draws_latents else 2, 8, 8)
    assert torch.equal(model.from_moments(moments, noise), model.latents(images, noise))
    encoded = model.encode(images)
    expected = encoded.latent_dist.from_noise(noise) if model.draws_latents else encoded.latents
    assert torch.equal(model.latents(images, noise), expected)


@pytest.mark.parametrize(
    "experiment", [pytest.param("celebahq", marks=pytest.mark.soak), "lsun_churches"]
)  # VQ; KL, whose scale is measured
def test_training_on_cached_latents_is_training_on_images(experiment, photos, tiny_runs, tmp_path, cached):
    """Mirrored ones among them."""
    images = (f"data.root={photos}", "data.flip=true", "data.val_fraction=0.2", "data.on_error=skip")
    online = stage_2(tmp_path / "online", tiny_runs, experiment, *images, "data.latents=online")
    assert cached() == []
    for dtype, tolerance in (("float32", 1e-5), ("float16", 1e-3)):
        kept = stage_2(tmp_path / dtype, tiny_runs, experiment, *images, f"data.latents_dtype={dtype}")
        assert kept == pytest.approx(online, rel=tolerance)
        lists = [tmp_path / runs / experiment / "diffusion/skipped_files.txt" for runs in (dtype, "online")]
        assert lists[0].read_text() == lists[1].read_text()
        assert "7.png" in lists[0].read_text()
    assert len({path.parent for path in cached()}) == 2
    with pytest.raises(ValueError, match=r"7\.png: .*; data\.on_error=skip passes over such files"):
        stage_2(tmp_path / "raise", tiny_runs, experiment, *images[:-1])


@pytest.mark.parametrize("experiment", ["celebahq", "lsun_churches"])
def test_moments_are_those_of_images_mirrored_or_not_bit_for_bit(experiment, photos, tiny_runs, tmp_path, cached):
    images = (f"data.root={photos}", "data.flip=true", "data.val_fraction=0.2", "data.on_error=skip")
    stage_2(tmp_path, tiny_runs, experiment, *images, "data.latents_dtype=float32", "max_images=8")
    autoencoder = load_autoencoder(tiny_runs / experiment)
    data = FolderImages(photos, "train", 32, val_fraction=0.2, flip=True, on_error="skip")
    first = torch.stack([data[index]["image"] for index in range(8)])  # as many as were encoded at a time
    kept = load_file(cached()[0])["moments"]
    with undisturbed(), torch.no_grad():
        assert torch.equal(kept[:8, 0], autoencoder.moments(first))
        assert torch.equal(kept[:8, 1], autoencoder.moments(first.flip(-1)))


def encoded(autoencoder, images, views, precision):
    """Moments of images, `(B, views, M, h, w)`, computed here."""
    both = (images, images.flip(-1))[:views]
    with undisturbed(), torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        return torch.stack([autoencoder.moments(view).float() for view in both], dim=1)


def drawn_batches(paths, size=8):
    """The images of each shard, as many at a time as were encoded, with what is kept of them."""
    images = [image["image"] for image in DrawnImages("train", 32)]
    for number, path in enumerate(paths):
        kept = load_file(path)["moments"]
        own = torch.stack(images[number * 16 : number * 16 + len(kept)])
        yield own.split(size), kept.split(size)


@pytest.mark.parametrize("experiment", ["celebahq", "lsun_churches"])
def test_latents_are_encoded_in_float32_whatever_the_training_computes_in(experiment, tiny_runs, tmp_path, cached):
    """And so they are the ones that a training in float32 has cached."""
    stage_2(tmp_path, tiny_runs, experiment, "trainer.precision=bf16-mixed", "max_images=8")
    autoencoder = load_autoencoder(tiny_runs / experiment)
    for images, kept in drawn_batches(cached()):
        exact = [encoded(autoencoder, batch, 1, "float32") for batch in images]
        assert all(torch.equal(*pair) for pair in zip(kept, [moments.half() for moments in exact], strict=True))
        if experiment == "celebahq":
            codes = [autoencoder.quantize(torch.cat(m).flatten(0, 1).float()).info.indices for m in (kept, exact)]
            assert (codes[0] == codes[1]).float().mean() > 0.995
    assert read_json(cached()[0].with_name("meta.json"))["precision"] == "32-true"  # and so their key is as it was
    made = {path: path.stat().st_mtime_ns for path in cached()}
    stage_2(tmp_path / "float32", tiny_runs, experiment, "trainer.precision=32-true", "max_images=8")
    assert {path: path.stat().st_mtime_ns for path in cached()} == made


@pytest.mark.parametrize("experiment", ["celebahq", "lsun_churches"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_error_of_encoding_in_bfloat16_is_measured_and_said(experiment, dtype, tiny_runs, tmp_path, cached, capsys):
    """Also by a run that finds them encoded. That of float16 alone is thirty times smaller."""
    settings = ("data.latents_precision=bfloat16", f"data.latents_dtype={dtype}", "max_images=8")
    said = []
    for runs in ("one", "two"):
        stage_2(tmp_path / runs, tiny_runs, experiment, *settings)
        said += [line for line in capsys.readouterr().out.splitlines() if "rounds the latents by" in line]
    assert said[0] == said[1]
    autoencoder = load_autoencoder(tiny_runs / experiment)
    squares, changed = torch.zeros(2), []
    for images, kept in drawn_batches(cached()):
        exact, rounded = (encoded(autoencoder, images[0], 1, name) for name in ("float32", "bfloat16"))
        assert torch.equal(kept[0], rounded.to(kept[0].dtype))
        squares += torch.stack([(kept[0].float() - exact).square().sum(), exact.square().sum()])
        if experiment == "celebahq":
            codes = [autoencoder.quantize(moments.flatten(0, 1).float()).info.indices for moments in (kept[0], exact)]
            changed.append((codes[0] != codes[1]).float().mean().item())
    words = rf"encoding in bfloat16, kept in {dtype}, rounds the latents by ([\d.e-]+) \(relative RMS\)"
    found = re.match(words + (r", ([\d.]+)% of the codes change: " if changed else ": "), said[0])
    assert float(found[1]) == pytest.approx((squares[0] / squares[1]).sqrt().item(), rel=0.03)  # of two digits
    assert float(found[1]) > 2e-3
    if changed:
        assert float(found[2]) == pytest.approx(100 * sum(changed) / len(changed), abs=0.01)


def test_an_interrupted_encode_continues_and_later_runs_find_it_done(tiny_runs, tmp_path, cached, monkeypatch):
    write, written = LatentCache.write, []

    def third_fails(cache, shard, *arguments):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(shard)
        write(cache, shard, *arguments)

    monkeypatch.setattr(LatentCache, "write", third_fails)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        stage_2(tmp_path, tiny_runs)
    assert len(cached()) == 2
    before = {path: path.stat().st_mtime_ns for path in cached()}
    monkeypatch.setattr(LatentCache, "write", lambda *arguments: (written.append(arguments[1]), write(*arguments)))
    losses = stage_2(tmp_path, tiny_runs)
    assert sorted(written) == [0, 1, 2, 3]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert stage_2(tmp_path / "again", tiny_runs) == losses
    assert len(written) == 4


def test_no_room_and_a_damaged_shard_end_with_one_line(tiny_runs, tmp_path, cached, monkeypatch):
    disk = type("Usage", (), {"free": 100})
    with monkeypatch.context() as patch:
        patch.setattr(encoding.shutil, "disk_usage", lambda _: disk)
        with pytest.raises(ValueError, match=r"paths\.cache=.*: 100 B are free, and the latents need .* kB: choose"):
            stage_2(tmp_path, tiny_runs)
    stage_2(tmp_path, tiny_runs)
    path = cached()[1]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"00001\.safetensors: cannot be used: .* --prune") as error:
        stage_2(tmp_path, tiny_runs, "celebahq", "max_images=80")
    assert "\n" not in str(error.value)


def test_a_plan_counts_the_encoding_and_no_encoder_in_the_steps(tmp_path, capsys, cached):
    module, data, make_trainer = tiny("lsun_churches/diffusion")
    tried = Trial(module, data, make_trainer)
    module.autoencoder.encoder.forward = None  # nothing may call it
    with undisturbed():
        assert len(tried.run(batch_size=8, images=8, steps=3).seconds) == 2
    del module.autoencoder.encoder.forward
    with undisturbed():
        line = plan.encoding_line(tried)
    assert line.startswith("once, 64 images in ")
    cache = latent_cache(module.autoencoder, data)
    assert f"{plan.readable(cache.num_bytes(64))} of float16 in {tmp_path}/cache/latents, encoded in float32" in line
    cache.open_folder()
    for shard in cache.shards:
        cache.write(shard, torch.zeros(16, *cache.shape), {})
    assert plan.encoding_line(tried) == f"done, by an earlier run: {cache.folder}"
    lean, full = (estimate(module, (32, 32), 8, moments=moments) for moments in (tried.moments, None))
    assert full.held - lean.held == 8 * 4 * (3 * 32 * 32 - math.prod(tried.moments))  # images, or moments


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.soak)])
def test_a_run_killed_while_it_encodes(processes, tiny_runs, tmp_path):
    several = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2") if processes == 2 else ()
    given = (f"autoencoder={tiny_runs}/celebahq", f"paths.cache={tmp_path}/cache", "debug=tiny", "logger=csv")
    command = ["experiment=celebahq/diffusion", *given, *several]
    killed = kills.start(tmp_path / "runs", command, kills.Moment("hook diffusion on_fit_start", delay=0.15), processes)
    assert killed.killed
    shards = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.safetensors")}
    kills.start(tmp_path / "runs", command, world_size=processes)
    assert {path: path.stat().st_mtime_ns for path in shards} == shards
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 4
    assert list((tmp_path / "cache").rglob(".*")) == []
    rows = [metrics(runs / "celebahq/diffusion")[64] for runs in (tmp_path / "runs", tiny_runs)]
    assert rows[0]["val/loss"] == pytest.approx(rows[1]["val/loss"], rel=1e-3)  # train/loss is of one rank's images

"""What `plan=true` says, and what it writes: pictures alone."""

import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from ldm_lab.data.images import FolderImages
from ldm_lab.metrics.reconstruction import psnr
from ldm_lab.models.autoencoders import load_autoencoder
from ldm_lab.training.planning import plan, preview
from ldm_lab.training.planning.memory import num_bytes
from ldm_lab.training.planning.trial import Measured, Trial
from ldm_lab.utils.images import to_pil, to_unit
from tests.trained import undisturbed
from tests.training.stages import tiny

GB = 2**30
CPU = torch.device("cpu")


@pytest.fixture
def photos(tmp_path):
    """A folder of pictures, one of them damaged, with one that is small and a large one."""
    folder = tmp_path / "photos"
    folder.mkdir()
    sizes = [(40, 60), (20, 90), *[(64, 48)] * 14, (300, 200)]
    for number, size in enumerate(sizes):
        Image.effect_noise(size, 60).convert("RGB").save(folder / f"{number}.png")
    (folder / "damaged.png").write_bytes(b"no picture")
    return folder


def in_photos(photos, *overrides):
    options = ["data=image_folder", f"data.root={photos}", "data.image_size=32", "data.global_batch_size=8"]
    return tiny("celebahq/autoencoder", *options, "data.num_workers=0", *overrides)


def test_the_images_are_described_and_shown_as_the_network_sees_them(photos, tmp_path, capsys):
    _, data, _ = in_photos(
        photos, "data.flip=true", "data.random_crop=true", "data.latents=online", "data.on_error=skip"
    )
    preview.show_images(data, tmp_path / "runs/plan_photos.png")
    said = capsys.readouterr().out
    assert f"images: {data.num_train} for training, {data.num_val} held out" in said
    assert data.num_train + data.num_val == 18
    train = FolderImages(photos, "train", 32)
    good = [i for i in range(len(train)) if "damaged" not in train.path(i).name]
    sizes = [train.read(i).size for i in good]
    small, large = min(sizes, key=lambda s: s[0] * s[1]), max(sizes, key=lambda s: s[0] * s[1])
    assert f"{small[0]} x {small[1]} to {large[0]} x {large[1]} pixels in a sample of {len(sizes)}; " in said
    assert said.count("damaged.png") == len(train) - len(good)
    sheet = Image.open(tmp_path / "runs/plan_photos.png")
    data.batch_size = data.global_batch_size
    first = next(iter(data.train_dataloader()))["image"][0]  # (3, 32, 32)
    assert np.array_equal(np.asarray(sheet)[2:34, 2:34], np.asarray(to_pil(to_unit(first[None]))[0]))


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([(10, 20), (64, 64)], "10 x 20 to 64 x 64 pixels in a sample of 2; 1 are smaller than 32 x 16 and will be "),
        ([(32, 16), (100, 50)], "32 x 16 to 100 x 50 pixels in a sample of 2; none is enlarged"),
        ([(31, 500)], "31 x 500 to 31 x 500 pixels in a sample of 1; 1 are smaller than 32 x 16"),
    ],
)
def test_small_images_are_counted(sizes, expected):
    assert preview.describe_sizes(sizes, image_size=(16, 32)).startswith(expected)


@pytest.mark.parametrize("experiment", ["celebahq", "lsun_churches"])
def test_a_given_autoencoder_is_judged_on_held_out_images(experiment, tiny_runs, tmp_path, capsys):
    autoencoder = load_autoencoder(tiny_runs / experiment)
    _, data, _ = tiny(f"{experiment}/diffusion")
    preview.show_reconstructions(autoencoder, data, CPU, tmp_path / "sheet.png")
    pattern = r"(\S+) dB PSNR: below 24 .*deviation (\S+); model.scaling_factor=measure gives (\S+)"
    quality, std, scale = re.search(pattern, capsys.readouterr().out, re.S).groups()
    images = data.preview(data.num_val)
    with torch.no_grad():
        latents = autoencoder.latents(images)
        expected = psnr(autoencoder.decode(latents).sample, images).item()
    assert float(quality) == pytest.approx(expected, abs=0.06)
    assert float(std) * float(scale) == pytest.approx(1, rel=5e-3)
    wanted = latents.double().std().item()
    assert float(std) == pytest.approx(wanted, rel=5e-3) if experiment == "celebahq" else float(std) > wanted  # drawn
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (2 + 2 * 34, 2 + 8 * 34, 3)
    assert np.array_equal(sheet[2:34, 2:34], np.asarray(to_pil(to_unit(images[:1]))[0]))
    assert autoencoder.device == CPU


def test_a_verdict_for_each_quality():
    assert len({preview.judge(quality) for quality in (15, 23.9)}) == 1
    assert len({preview.judge(quality) for quality in (23.9, 24, 27.9, 28, 40)}) == 3


@pytest.mark.parametrize("experiment", ["celebahq/autoencoder", "lsun_churches/diffusion"])
def test_a_stage_is_tried_and_described(experiment, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plan, "STEPS", 5)
    stage = tiny(experiment, "data.batch_size=4")
    with undisturbed():
        needed = plan.show_stage(Trial(*stage), max_images=7_200_000, snapshots=None)
    said = capsys.readouterr().out
    name = experiment.partition("/")[2]
    assert re.match(rf"{name} on 1 x \d+ CPU threads, 32-true\n", said)
    assert "data.batch_size=4, 2 micro-batches a step" in said
    rate = float(re.search(r"speed +(\S+) images/s, the median of 4 step", said)[1].replace(",", ""))
    time, unit = re.search(r"time +7,200,000 images in (\S+) (\w+)", said).groups()
    assert float(time) * {"hours": 3600, "days": 86400}[unit] == pytest.approx(7.2e6 / rate, rel=0.05)
    assert ("latents" in said) == (name == "diffusion")
    assert 2 * num_bytes(stage[0].state_dict()) < needed < 2**30
    assert list(tmp_path.iterdir()) == []


def measured(rate=100.0):
    return Measured(peak=12 * GB, seconds=[8 / rate] * 9, images=8, checkpoint=3 * GB)


def test_several_devices_are_multiplied_and_said():
    assert plan.speed_line(measured(), 1) == "100 images/s, the median of 9 step(s)"
    assert (
        plan.speed_line(measured(), 8)
        == "100 images/s, the median of 9 step(s) of one device, x 8 devices if they scale"
    )


def test_latents_on_disk():
    _, data, _ = tiny("celebahq/diffusion")
    module, _, _ = tiny("celebahq/autoencoder")
    line = plan.latents_line(module.autoencoder, data)
    assert line == "3 x 8 x 8; of all images 48 kB in float32, 24 kB in float16"  # 64 x 192 numbers
    data.train_set.flip = True
    assert "96 kB in float32, 48 kB in float16, those of flipped images too" in plan.latents_line(
        module.autoencoder, data
    )


def test_disk_holds_three_checkpoints_the_result_and_snapshots_that_share_the_first_stage():
    module, _, _ = tiny("celebahq/diffusion")
    trial = SimpleNamespace(module=module)
    unet, first = num_bytes(module.unet.state_dict()), num_bytes(module.autoencoder.state_dict())
    result = 9 * GB + unet + first
    assert plan.on_disk(trial, measured(), 1000, snapshots=None) == result
    assert plan.on_disk(trial, measured(), 1000, snapshots=1001) == result
    assert plan.on_disk(trial, measured(), 1000, snapshots=300) == result + 3 * unet + first
    stage_1, _, _ = tiny("celebahq/autoencoder")
    size = 9 * GB + num_bytes(stage_1.autoencoder.state_dict())
    assert plan.on_disk(SimpleNamespace(module=stage_1), measured(), 1000, snapshots=300) == size


def test_a_disk_that_is_too_small_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=10 * GB if folder == tmp_path else 0))
    plan.check_disk(4 * GB, tmp_path / "not/yet/there")
    assert "disk: the run will need 4 GB of the 10 GB that are free at" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"paths\.runs=.*there: 10 GB are free, and the run will need 11 GB: choose"):
        plan.check_disk(11 * GB, tmp_path / "not/yet/there")


@pytest.mark.parametrize(
    ("seconds", "text"), [(30, "30 s"), (119, "119 s"), (150, "2.5 minutes"), (7200, "2.0 hours"), (3e6, "34.7 days")]
)
def test_durations(seconds, text):
    assert plan.duration(seconds) == text

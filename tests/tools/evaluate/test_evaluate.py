"""From a run, a folder or an array to figures in `eval/*.json`."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import vgg16

from ldm_lab.losses import perceptual
from ldm_lab.metrics import own
from ldm_lab.pipeline import LDMPipeline
from ldm_lab.runs.record import read_evaluation, read_run
from ldm_lab.sampling import files, generate
from ldm_lab.tools.evaluate.evaluate import evaluate, evaluate_autoencoder, evaluate_snapshots
from ldm_lab.utils.errors import UserError
from tests.tools.evaluate.requests import request
from tests.trained import copy, snapshot, undisturbed

KEYS = {
    "format", "source", "kind", "images_seen", "num_samples", "sampling", "extractor", "reference", "metrics",
    "versions",
}  # fmt: skip
DISTRIBUTION = {"fd_own", "kid", "precision", "recall", "density", "coverage"}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Features that have learned next to nothing do here."""
    monkeypatch.setattr(own, "STEPS", 2)
    with undisturbed():
        yield


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def run(tiny_runs, tmp_path):
    return copy(tiny_runs, tmp_path / "runs") / "celebahq"


def written(run):
    return [evaluation.content for evaluation in read_run(run).evaluations]


def test_a_run_is_compared_with_its_training_images(run, cache, capsys):
    scores = evaluate(request(run, cache))
    (content,) = written(run)
    assert content.keys() >= KEYS
    assert (content["kind"], content["num_samples"], content["images_seen"]) == ("samples", 12, 64)
    assert content["sampling"] == {"sampler": "ddim", "steps": 2, "eta": 0.0, "seed": 0}
    assert content["reference"]["count"] == 64
    assert content["reference"]["transform"]["image_size"] == [32, 32]
    assert content["extractor"]["name"] == "own"
    assert content["metrics"].keys() == scores.keys() == DISTRIBUTION | {"near_copies", "neighbour_distance"}
    for name, one in scores.items():
        assert content["metrics"][name]["value"] == one.value
        assert one.low is None or one.low <= one.value <= one.high
    assert content["held_out"]["count"] == 12  # of 16: as many as samples
    assert content["held_out"]["metrics"].keys() == DISTRIBUTION
    with Image.open(next((run / "eval").glob("*_neighbours.png"))) as sheet:
        assert sheet.size == (8 * 34 + 2, 3 * 34 + 2)  # twelve pairs
    said = capsys.readouterr().out
    assert "warning: 12 images for" in said
    assert "fd_own" in said


@pytest.mark.parametrize(
    ("kinds", "said"),
    [
        (
            ("JPEG", "PNG"),
            "warning: the images are JPEG files and the real ones are not: compression alone moves these",
        ),
        (("PNG", "JPEG"), "warning: the images are no JPEG files and the real ones are JPEG files: compression alone"),
        (("PNG", "WEBP"), None),
        (("JPEG", "JPEG"), None),
    ],
)
def test_other_compression_is_warned_of(tmp_path, cache, capsys, kinds, said):
    """What the content is, not the name."""
    for folder, kind in zip(("drawn", "real"), kinds, strict=True):
        (tmp_path / folder).mkdir()
        for n in range(8):
            noise = np.random.default_rng(n).integers(0, 256, (16, 16, 3), np.uint8)
            Image.fromarray(noise).save(tmp_path / folder / f"{n}.png", kind)
    evaluate(request(tmp_path / "drawn", cache, data=str(tmp_path / "real"), bootstrap=0))
    lines = [line for line in capsys.readouterr().out.splitlines() if "JPEG" in line]
    assert [line.startswith(said) for line in lines] == ([True] if said else [])


def test_drawn_samples_are_no_jpeg_files_but_their_training_images_may_be(run, tmp_path, cache, capsys):
    (tmp_path / "real").mkdir()
    for n in range(8):
        Image.fromarray(np.random.default_rng(n).integers(0, 256, (32, 32, 3), np.uint8)).save(
            tmp_path / f"real/{n}.jpg"
        )
    evaluate(request(run, cache, data=str(tmp_path / "real"), num_samples=6, bootstrap=0))
    assert "the real ones are JPEG files" in capsys.readouterr().out
    evaluate(request(run, cache, num_samples=6, bootstrap=0))
    assert "JPEG" not in capsys.readouterr().out


def test_a_picture_above_the_limit_names_the_flag(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for n in range(8):
        Image.fromarray(np.random.default_rng(n).integers(0, 256, (16, 16, 3), np.uint8)).save(tmp_path / f"{n}.png")
    for wanted in ({}, {"max_pixels": 255}):
        with pytest.raises(ValueError, match=r"0\.png: 256 pixels, .*: --max-pixels 256 takes it"):
            evaluate(request(tmp_path, cache, data=str(tmp_path), bootstrap=0, **wanted))
    evaluate(request(tmp_path, cache, data=str(tmp_path), bootstrap=0, max_pixels=256))


def test_the_same_again_draws_nothing_and_writes_the_same_file(run, cache, monkeypatch):
    evaluate(request(run, cache))
    (path,) = (run / "eval").glob("*.json")
    before = path.read_bytes()
    monkeypatch.setattr(generate, "save_pngs", None)
    monkeypatch.setattr(own, "trained", None)
    evaluate(request(run, cache))
    assert path.read_bytes() == before
    assert list((run / "eval").glob("*.json")) == [path]


def test_other_settings_have_a_file_of_their_own(run, cache):
    for changes in ({}, {"num_samples": 11}, {"seed": 1}, {"bootstrap": 6}):
        evaluate(request(run, cache, **changes))
    assert len(written(run)) == 4


def test_figures_do_not_depend_on_the_batch_size(run, cache):
    first = evaluate(request(run, cache, batch_size=12))
    shutil.rmtree(run / "samples")
    second = evaluate(request(run, cache, batch_size=1))
    for name, one in first.items():
        assert second[name].value == pytest.approx(one.value, rel=1e-3, abs=1e-6), name


def test_folders_and_arrays_of_the_samples_have_the_figures_of_the_run(run, cache, tmp_path):
    drawn = evaluate(request(run, cache))
    (folder,) = (run / "samples").iterdir()
    files.collect(folder, 12)
    evaluate(request(run, cache, save_reference=tmp_path / "real.npz"))
    for source in (folder, folder / "images", folder / "samples.npz"):
        found = evaluate(request(source, cache, data=str(tmp_path / "real.npz")))
        assert found.keys() == DISTRIBUTION
        assert all(found[name] == pytest.approx(drawn[name], rel=1e-9) for name in DISTRIBUTION)
    beside = folder.with_name(f"{folder.stem}_eval")
    assert [read_evaluation(path).content["kind"] for path in beside.glob("*.json")] == ["images"]


def test_real_images_may_be_a_folder_in_a_store_or_an_array(run, cache, tmp_path, s3):
    colours = np.random.default_rng(0).integers(0, 256, (20, 48, 40, 3), dtype=np.uint8)
    for index, picture in enumerate(colours):
        (tmp_path / "real").mkdir(exist_ok=True)
        Image.fromarray(picture).save(tmp_path / f"real/{index}.png")
    folder = evaluate(request(run, cache, data=str(tmp_path / "real")))
    assert folder.keys() == DISTRIBUTION  # none is held out
    (content,) = written(run)
    assert content["reference"]["count"] == 20
    store = evaluate(request(run, cache, data=s3.put_folder(tmp_path / "real", "real")))
    assert {name: value.value for name, value in store.items()} == {name: value.value for name, value in folder.items()}
    np.savez(tmp_path / "real.npz", arr_0=colours[:, :32, :32])
    assert evaluate(request(run, cache, data=str(tmp_path / "real.npz"))).keys() == DISTRIBUTION


def test_training_images_are_near_copies_and_held_out_ones_are_not(run, cache, tmp_path, monkeypatch):
    from ldm_lab.tools.evaluate import sources

    of_run = sources.run_data(run)
    monkeypatch.setattr(sources, "named_data", lambda *_: of_run)
    values = []
    for name, images in (("copies", of_run.images), ("held_out", of_run.held_out)):
        np.savez(tmp_path / f"{name}.npz", arr_0=torch.stack(list(images)).permute(0, 2, 3, 1).numpy())
        found = evaluate(request(tmp_path / f"{name}.npz", cache, data="the run's"))
        values.append((found["near_copies"].value, found["neighbour_distance"].value))
    assert values[0] == (1, pytest.approx(0, abs=1e-3))
    assert values[1][0] <= 1 / 16
    assert values[1][1] == 1
    assert (tmp_path / "copies_eval").is_dir()


# What cannot be.


def refused(asked):
    with pytest.raises(ValueError) as error:
        evaluate(asked)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_mistakes_end_in_one_line(run, cache, tmp_path):
    (tmp_path / "empty").mkdir()
    model = shutil.copytree(run / "diffusion/final", tmp_path / "elsewhere/model")
    assert "--data FOLDER" in refused(request(model, cache))
    assert "empty" in refused(request(tmp_path / "empty", cache))
    assert "no such file" in refused(request(tmp_path / "absent", cache))
    assert "no such file" in refused(request(run, cache, data=str(tmp_path / "absent.npz")))
    assert "there are own, inception" in refused(request(run, cache, features="clip"))
    np.savez(tmp_path / "small.npz", arr_0=np.zeros((9, 16, 16, 3), np.uint8))
    assert "16 x 16 pixels" in refused(request(run, cache, data=str(tmp_path / "small.npz")))
    np.savez(tmp_path / "one.npz", arr_0=np.zeros((1, 16, 16, 3), np.uint8))
    asked = request(tmp_path / "one.npz", cache, data=str(tmp_path / "small.npz"))
    assert "1 image(s): a distribution" in refused(asked)
    assert not (run / "eval").exists()
    assert not (run / "samples").exists()  # all of it was refused before anything was drawn


def test_statistics_of_another_size_or_extractor_are_refused(run, cache, tmp_path, monkeypatch):
    evaluate(request(run, cache, save_reference=tmp_path / "real.npz"))
    again = {"data": str(tmp_path / "real.npz"), "save_reference": tmp_path / "again.npz"}
    assert "statistics already" in refused(request(run, cache, **again))
    monkeypatch.setattr(own, "STEPS", 3)
    assert "extractor is" in refused(request(run, cache, data=str(tmp_path / "real.npz")))
    np.savez(tmp_path / "small.npz", arr_0=np.zeros((9, 16, 16, 3), np.uint8))
    line = refused(request(tmp_path / "small.npz", cache, data=str(tmp_path / "real.npz")))
    assert "transform.image_size is [32, 32] there and [16, 16] here" in line


def test_images_of_unequal_size_are_never_resized_in_silence(run, cache, tmp_path):
    (tmp_path / "mixed").mkdir()
    for index, size in enumerate((32, 32, 40, 32)):
        Image.new("RGB", (size, size)).save(tmp_path / f"mixed/{index}.png")
    asked = {"data": str(tmp_path / "mixed")}
    assert "40 x 40 pixels" in refused(request(tmp_path / "mixed", cache, **asked))
    assert evaluate(request(tmp_path / "mixed", cache, image_size=(32, 32), **asked))


def test_a_config_may_call_no_other_class(run, cache):
    path = run / "diffusion/config.yaml"
    text = path.read_text()
    path.unlink()  # the copy shares its file with the original
    path.write_text(text.replace("ldm_lab.data.drawn.drawn_or_folder", "ldm_lab.utils.writing.write_json"))
    assert "data of class ldm_lab.utils.writing.write_json" in refused(request(run, cache))


def test_images_that_are_gone_can_be_named(run, cache, tmp_path):
    path = run / "diffusion/config.yaml"
    text = path.read_text()
    path.unlink()
    path.write_text(text.replace("root: null", f"root: {tmp_path}/gone"))
    assert "--data" in refused(request(run, cache))
    np.savez(tmp_path / "real.npz", arr_0=np.zeros((9, 32, 32, 3), np.uint8))
    assert evaluate(request(run, cache, data=str(tmp_path / "real.npz")))


# First stages and snapshots.


def test_a_first_stage_alone(run, cache, capsys, monkeypatch):
    monkeypatch.setattr(perceptual, "_downloaded", lambda: (_ for _ in ()).throw(UserError("no route to host")))
    scores = evaluate_autoencoder(request(run, cache))
    (content,) = written(run)
    assert (content["kind"], content["num_samples"], content["sampling"]) == ("reconstructions", 16, None)
    assert scores.keys() == {"fd_own", "psnr", "ssim"}
    assert "lpips is left out" in capsys.readouterr().out
    status = json.loads((run / "autoencoder/status.json").read_text())
    assert scores["psnr"].value == pytest.approx(status["val/psnr"], rel=1e-3)
    assert scores["ssim"].value == pytest.approx(status["val/ssim"], rel=1e-3)


def test_lpips_of_a_first_stage_takes_its_weights_from_a_file(run, cache, tmp_path):
    network = vgg16().features
    torch.save(network.state_dict(), tmp_path / "vgg.pth")
    scores = evaluate_autoencoder(request(run, cache, lpips_weights=str(tmp_path / "vgg.pth")))
    assert scores["lpips"].low < scores["lpips"].value < scores["lpips"].high
    torch.save({}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="--lpips-weights"):
        evaluate_autoencoder(request(run, cache, lpips_weights=str(tmp_path / "other.pth")))


def test_snapshots_make_a_curve_and_the_best_is_exported(run, cache, tmp_path, capsys):
    final = LDMPipeline.from_pretrained(run)
    final.save_pretrained(run / "diffusion/snapshots/000000032")
    with torch.no_grad():
        final.unet.conv_out.weight.mul_(3)
    final.save_pretrained(run / "diffusion/snapshots/000000016")
    curve = evaluate_snapshots(request(run, cache), tmp_path / "best")
    assert list(curve) == [16, 32, 64]
    assert curve[32]["fd_own"].value == curve[64]["fd_own"].value != curve[16]["fd_own"].value
    assert [one["images_seen"] for one in written(run)] == [16, 32, 64]
    best = 16 if curve[16]["fd_own"].value < curve[32]["fd_own"].value else 32
    assert f"snapshots/{best:09d} -> " in capsys.readouterr().out
    before = snapshot(tmp_path / "best")
    with pytest.raises(ValueError, match="must not exist, or be an empty folder"):
        evaluate_snapshots(request(run, cache), tmp_path / "best")
    assert snapshot(tmp_path / "best") == before


def test_a_run_without_snapshots_says_how_they_are_made(run, cache):
    with pytest.raises(ValueError, match="snapshots=1M"):
        evaluate_snapshots(request(run, cache))


def test_guided_samples_have_figures_of_their_own(run, cache):
    weak = LDMPipeline.from_pretrained(run)
    with torch.no_grad():
        weak.unet.conv_out.weight.mul_(0.5)
    weak.save_pretrained(run / "diffusion/snapshots/000000016")
    how = {"guide": f"{run}@16", "guidance": 2.0, "guidance_interval": [0.1, 100.0]}
    for settings in ({}, how, {**how, "guidance": 1.0}):
        evaluate(request(run, cache, **settings))
    plain, guided = written(run)  # at scale 1 the guide changes nothing
    assert guided["sampling"] == {**plain["sampling"], **how}
    assert plain["sampling"].keys() == {"sampler", "steps", "eta", "seed"}
    assert guided["images"] != plain["images"]
    assert len(list((run / "samples").glob("*_guided2_0.1_100_by*"))) == 1
    assert len(list((run / "eval").glob("*_seed0_guided2_0.1_100_at64_*.json"))) == 1

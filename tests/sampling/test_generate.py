"""From seeds to files: which samples are drawn, what they depend on, and what they are written as."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from lightning import Trainer
from PIL import Image

from ldm_lab import DDIMScheduler, LDMPipeline
from ldm_lab.checkpoints.locate import State
from ldm_lab.diffusion.samplers import choose
from ldm_lab.sampling import generate
from ldm_lab.sampling.files import RGB_PNG, collect
from ldm_lab.sampling.generate import (
    SampleSettings,
    SamplingModule,
    claim,
    default_folder,
    describe,
    loader,
)
from ldm_lab.utils import randomness
from tests.helpers import GOLDEN, contents

MODEL = GOLDEN / "diffusers" / "ldm_tiny"
SETTINGS = SampleSettings(seed=0, sampler="ddim", steps=2, eta=0.0, precision="32-true")


@pytest.fixture
def pipe():
    return LDMPipeline.from_pretrained(MODEL)


def predict(module, indices, batch_size):
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = Trainer(accelerator="cpu", devices=1, **dict.fromkeys(quiet, False))
    trainer.predict(module, loader(indices, batch_size), return_predictions=False)


def read(folder, indices):
    return np.stack([np.asarray(Image.open(RGB_PNG.path(folder, index))) for index in indices])


def write_images(folder, count):
    """Files as sampling leaves them: image i is full of i."""
    for index in range(count):
        path = RGB_PNG.path(folder, index)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((2, 3, 3), index, dtype=np.uint8)).save(path)


# Which samples.


def test_what_is_missing(tmp_path):
    assert RGB_PNG.missing(tmp_path, 4) == [0, 1, 2, 3]
    write_images(tmp_path, 4)
    assert RGB_PNG.missing(tmp_path, 4) == []
    RGB_PNG.path(tmp_path, 2).unlink()
    assert RGB_PNG.missing(tmp_path, 6) == [2, 4, 5]


@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_each_index_falls_to_one_device(count, world_size):
    indices = [5 * index for index in range(count)]
    parts = [loader(indices, 2, rank, world_size) for rank in range(world_size)]
    batches = [[batch.tolist() for batch in part] for part in parts]
    assert sorted(index for part in batches for batch in part for index in batch) == indices
    assert all(len(batch) <= 2 for part in batches for batch in part)
    counts = [sum(map(len, part)) for part in batches]
    assert max(counts) - min(counts) <= 1


def test_each_state_and_sampler_has_a_folder_of_its_own(tmp_path):
    own = "ddim_2_eta0_seed0"
    assert default_folder(State(tmp_path, tmp_path), SETTINGS) == tmp_path / "samples" / own
    on_the_way = State(tmp_path, tmp_path / "last.ckpt", 12_345)
    assert default_folder(on_the_way, SETTINGS) == tmp_path / "samples" / f"{own}_at12345"
    file = tmp_path / "model.ckpt"
    assert default_folder(State(file, file, 8), SETTINGS) == tmp_path / "model_samples" / f"{own}_at8"
    changed = [{"seed": 1}, {"steps": 3}, {"eta": 0.5}, {"sampler": "ddpm"}]
    assert len({default_folder(on_the_way, replace(SETTINGS, **change)) for change in changed}) == 4


# What they depend on.


@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_sample_i_is_the_same_in_any_batch(pipe, tmp_path, monkeypatch, name):
    pipe.scheduler = choose(name, pipe.scheduler)
    noise, latents = {}, {}
    decode = LDMPipeline.decode

    def record(pipe, x):
        latents[batch_size].append(x)
        return decode(pipe, x)

    monkeypatch.setattr(LDMPipeline, "decode", record)
    pipe.unet.register_forward_pre_hook(lambda _, args: noise[batch_size].append(args[0]) if int(args[1]) else None)
    pictures = {}
    for batch_size in (1, 3):
        noise[batch_size], latents[batch_size] = [], []
        predict(SamplingModule(pipe, tmp_path / str(batch_size), seed=5, steps=2, eta=0.0), [3, 4, 5, 9], batch_size)
        pictures[batch_size] = read(tmp_path / str(batch_size), [3, 4, 5, 9])
    assert torch.equal(torch.cat(noise[1]), torch.cat(noise[3]))
    for alone, together in zip(torch.cat(latents[1]), torch.cat(latents[3]), strict=True):
        assert (alone - together).norm() <= 1e-4 * alone.norm()
    assert np.abs(pictures[1].astype(int) - pictures[3]).max() <= 1


@pytest.mark.parametrize(("count", "world_size"), [(5, 1), (7, 2), (2, 3), (0, 1), (4, 1)])
def test_full_batches_hold_each_index_and_their_last_again(count, world_size):
    indices = list(range(10, 10 + count))
    parts = [[b.tolist() for b in loader(indices, 2, rank, world_size, full=True)] for rank in range(world_size)]
    assert all(len(batch) == 2 for part in parts for batch in part)
    assert sorted({index for part in parts for batch in part for index in batch}) == indices
    assert sum(map(len, parts)) == sum(-(-len(indices[rank::world_size]) // 2) for rank in range(world_size))


def test_what_fills_a_batch_up_is_drawn_alike_and_written_once(pipe, tmp_path, monkeypatch):
    """Compiled where the networks are by then; the call of `compile` alone takes minutes."""
    compiled, written = [], []
    monkeypatch.setattr(LDMPipeline, "compile", lambda pipe: compiled.append(pipe.device))
    save = generate.save_pngs
    monkeypatch.setattr(generate, "save_pngs", lambda images: written.append(list(images)) or save(images))
    module = SamplingModule(pipe, tmp_path, seed=5, steps=2, eta=0.0, compiled=True)
    predict(module, [3, 4, 5, 5], batch_size=2)
    assert compiled == [torch.device("cpu")]
    assert written == [[RGB_PNG.path(tmp_path, index) for index in batch] for batch in ([3, 4], [5])]
    assert RGB_PNG.missing(tmp_path, 6) == [0, 1, 2]


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_sample_i_is_what_the_pipeline_draws_from_its_generator(pipe, tmp_path, eta):
    predict(SamplingModule(pipe, tmp_path, seed=5, steps=2, eta=eta), [7], batch_size=4)
    picture = pipe(1, randomness.generator(5, "sample", 7), eta=eta, num_inference_steps=2).images[0]
    assert np.array_equal(read(tmp_path, [7])[0], np.asarray(picture))


def test_other_seeds_and_indices_give_other_samples(pipe, tmp_path):
    for seed in (0, 1):
        predict(SamplingModule(pipe, tmp_path / str(seed), seed=seed, steps=1, eta=0.0), [0, 1], batch_size=2)
    images = np.concatenate([read(tmp_path / str(seed), [0, 1]) for seed in (0, 1)])
    assert len(np.unique(images, axis=0)) == 4


# What they are written as.


def test_the_array_is_what_the_evaluator_reads(tmp_path):
    write_images(tmp_path, 5)
    collect(tmp_path, 4)
    with np.load(tmp_path / "samples.npz", allow_pickle=False) as archive:
        assert archive.files == ["arr_0"]
        images = archive["arr_0"]
    assert (images.shape, images.dtype) == ((4, 2, 3, 3), np.uint8)
    assert np.array_equal(images, read(tmp_path, range(4)))
    with Image.open(tmp_path / "grid.png") as sheet:
        assert sheet.size == (2 * (3 + 2) + 2, 2 * (2 + 2) + 2)


def test_a_grid_shows_the_first_images_only(tmp_path):
    write_images(tmp_path, 70)
    collect(tmp_path, 70)
    with Image.open(tmp_path / "grid.png") as sheet:
        assert sheet.size == (8 * (3 + 2) + 2, 8 * (2 + 2) + 2)
    with np.load(tmp_path / "samples.npz") as archive:
        assert archive["arr_0"][:, 0, 0, 0].tolist() == list(range(70))


def test_collecting_without_all_images_leaves_the_old_array(tmp_path):
    write_images(tmp_path, 2)
    collect(tmp_path, 2)
    before = (tmp_path / "samples.npz").read_bytes()
    with pytest.raises(FileNotFoundError):
        collect(tmp_path, 3)
    assert (tmp_path / "samples.npz").read_bytes() == before
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".tmp"]


# The manifest.


def test_the_manifest_says_what_the_images_follow_from(pipe, tmp_path):
    manifest = describe(pipe, "runs/demo", SETTINGS)
    claim(tmp_path / "new", manifest)
    written = json.loads((tmp_path / "new" / "manifest.json").read_text())
    assert written == json.loads(json.dumps(manifest))
    assert {**asdict(SETTINGS), **written} == written
    assert written["ckpt"] == "runs/demo"
    assert written["hashes"].keys() == {"unet", "vqvae"}
    assert written["scheduler"]["beta_end"] == 0.0195
    assert written["versions"]["torch"] == torch.__version__


def test_the_same_model_may_have_moved(pipe, tmp_path):
    claim(tmp_path, describe(pipe, "runs/demo", SETTINGS))
    write_images(tmp_path, 1)
    before = contents(tmp_path)
    claim(tmp_path, {**describe(pipe, "elsewhere/demo", SETTINGS), "versions": {"torch": "3.0"}})
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed: 0 -> 1"),
        ({"steps": 3}, "steps: 2 -> 3"),
        ({"eta": 0.5}, "eta: 0.0 -> 0.5"),
        ({"sampler": "ddpm"}, "sampler: ddim -> ddpm"),
        ({"precision": "bf16-mixed"}, "precision: 32-true -> bf16-mixed"),
        ({"hashes": {"unet": "a", "vqvae": "b"}}, "hashes: .* -> {'unet': 'a', 'vqvae': 'b'}"),
    ],
)
def test_samples_of_other_settings_stay_untouched(pipe, tmp_path, change, message):
    manifest = describe(pipe, "runs/demo", SETTINGS)
    claim(tmp_path, manifest)
    write_images(tmp_path, 1)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=rf"holds samples of other settings \({message}\): choose another output="):
        claim(tmp_path, {**manifest, **change})
    assert contents(tmp_path) == before


@pytest.mark.parametrize("key", ["compile", "tiling"])
def test_samples_of_before_there_was_a_setting_are_those_without_it(pipe, tmp_path, key):
    manifest = describe(pipe, "runs/demo", SETTINGS)
    claim(tmp_path, manifest)
    write_images(tmp_path, 1)
    claim(tmp_path, {**manifest, key: False})
    with pytest.raises(ValueError, match=f"{key}: False -> True"):
        claim(tmp_path, {**manifest, key: True})


def test_samples_of_before_the_sampler_had_a_setting_are_those_without_it(pipe, tmp_path):
    pipe.scheduler = choose("dpm_solver", pipe.scheduler)
    settings = replace(SETTINGS, sampler="dpm_solver")
    claim(tmp_path, describe(pipe, "runs/demo", settings))
    write_images(tmp_path, 1)
    written = json.loads((tmp_path / "manifest.json").read_text())
    for key in ("use_karras_sigmas", "lambda_min_clipped"):
        del written["scheduler"][key]
    (tmp_path / "manifest.json").write_text(json.dumps(written))
    claim(tmp_path, describe(pipe, "runs/demo", settings))
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, lambda_min_clipped=-5.1)
    with pytest.raises(ValueError, match="other settings"):
        claim(tmp_path, describe(pipe, "runs/demo", settings))


def test_another_noise_schedule_is_another_setting(pipe, tmp_path):
    claim(tmp_path, describe(pipe, "runs/demo", SETTINGS))
    write_images(tmp_path, 1)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, set_alpha_to_one=False)
    with pytest.raises(ValueError, match="other settings"):
        claim(tmp_path, describe(pipe, "runs/demo", SETTINGS))


def test_a_command_that_drew_nothing_leaves_the_folder_free(pipe, tmp_path):
    manifest = describe(pipe, "runs/demo", SETTINGS)
    claim(tmp_path, manifest)
    claim(tmp_path, {**manifest, "steps": 3})
    assert json.loads((tmp_path / "manifest.json").read_text())["steps"] == 3


def test_a_folder_of_something_else_is_refused(pipe, tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"is not empty and has no manifest.json: choose another output="):
        claim(tmp_path, describe(pipe, "runs/demo", SETTINGS))
    assert contents(tmp_path) == before

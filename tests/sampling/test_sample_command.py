"""`python sample.py`: from the command line to files, in one process and in two."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch._dynamo.utils import counters

import sample
from ldm_lab.checkpoints import locate
from ldm_lab.config.compose import ConfigError
from ldm_lab.models.tiling import Tiles
from ldm_lab.pipeline import LDMPipeline
from ldm_lab.sampling.files import RGB_PNG
from ldm_lab.sampling.pictures import PictureRequest
from ldm_lab.utils import reading
from ldm_lab.utils.randomness import generator
from tests.helpers import GOLDEN, contents
from tests.trained import copy

ROOT = Path(__file__).resolve().parents[2]
MODEL = GOLDEN / "diffusers" / "ldm_tiny"


def command(output, **settings):
    settings = {"ckpt": MODEL, "num_samples": 3, "batch_size": 1, "sampler.steps": 2, "trainer": "cpu", **settings}
    return [f"output={output}", *(f"{key}={value}" for key, value in settings.items())]


@pytest.mark.parametrize(("precision", "dtype"), [("bf16-true", torch.bfloat16), ("16-true", torch.float16)])
def test_networks_are_rounded_where_it_is_asked_for_and_nothing_else_is(tmp_path, precision, dtype):
    """The samples are those of a pipeline in that type, from the same noise; the model is known by its own weights."""
    folders = [tmp_path / name for name in ("rounded", "full")]
    for folder, name in zip(folders, (precision, "32-true"), strict=True):
        sample.job(command(folder, num_samples=2, interpolate="[0,1]", **{"trainer.precision": name}))
    pipe = LDMPipeline.from_pretrained(MODEL, torch_dtype=dtype)
    for index in range(2):
        drawn = pipe(1, [generator(0, "sample", index)], 0.0, 2).images[0]
        assert np.array_equal(np.asarray(drawn), np.asarray(Image.open(RGB_PNG.path(folders[0], index))))
    PictureRequest(interpolate=[0, 1]).write(pipe, tmp_path, seed=0, steps=2, eta=0.0)
    name = "interpolation.png"
    assert (tmp_path / name).read_bytes() == (folders[0] / name).read_bytes() != (folders[1] / name).read_bytes()
    rounded, full = (json.loads((folder / "manifest.json").read_text()) for folder in folders)
    assert (rounded.pop("precision"), full.pop("precision")) == (precision, "32-true")
    assert rounded == full


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("64-true", "trainer.precision=64-true: give auto, 32-true, bf16-mixed, 16-mixed, bf16-true or 16-true"),
        ("16-mixed", "trainer.precision=16-mixed: needs a GPU; use trainer.precision=bf16-mixed or 32-true on a CPU"),
    ],
)
def test_other_precisions_are_refused(tmp_path, setting, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        sample.job(command(tmp_path / "out", **{"trainer.precision": setting}))
    assert not (tmp_path / "out").exists()


def test_a_device_that_is_not_there_is_refused_before_the_model_is_looked_for(tmp_path):
    with pytest.raises(
        ValueError, match=r"^trainer\.accelerator=tpu: no such device here; use trainer\.accelerator=cpu$"
    ):
        sample.job(["ckpt=/nowhere", "trainer.accelerator=tpu"])


def callers():
    """The modules of this project on the stack, outermost first."""
    frame, names = inspect.currentframe(), []
    while frame := frame.f_back:
        names.append(frame.f_globals["__name__"])
    ours = [name for name in reversed(names) if name.startswith(("ldm_lab.", "sample"))]
    return list(dict.fromkeys(ours))


def test_a_checkpoint_passes_eight_modules_from_the_command_line_to_its_tensors(tiny_runs, tmp_path, monkeypatch):
    """Those on the stack where a folder is looked for, and where tensors are read: see docs/architecture.md."""
    passed = []

    def spy(module, name):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given, **named: passed.append(callers()) or real(*given, **named))

    for module, name in ((locate, "search"), (reading, "load_file"), (torch, "load")):
        spy(module, name)
    unfinished = copy(tiny_runs, tmp_path) / "celebahq/diffusion"
    for ckpt in (tiny_runs / "celebahq", unfinished / "checkpoints/last.ckpt"):
        passed.clear()
        sample.job(command(tmp_path / f"{ckpt.stem}-drawn", ckpt=ckpt))
        modules = {module for stack in passed for module in stack}
        assert {"sample", "ldm_lab.checkpoints.locate", "ldm_lab.utils.reading"} < modules
        assert len(modules) <= 8, modules


def assert_array_holds_the_images(folder, count):
    with np.load(folder / "samples.npz") as archive:
        images = archive["arr_0"]
    assert np.array_equal(images, [np.asarray(Image.open(RGB_PNG.path(folder, index))) for index in range(count)])


def test_the_command_writes_everything_and_adds_what_is_missing(tmp_path, capsys):
    sample.job(command(tmp_path, num_samples=2, batch_size=2))
    assert "2 samples (2 new)" in capsys.readouterr().out
    first = contents(tmp_path)
    assert sorted(first) == [
        "grid.png",
        "images/000000.png",
        "images/000001.png",
        "manifest.json",
        "samples.npz",
    ]
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "images").iterdir()}

    sample.job(command(tmp_path, num_samples=3, batch_size=2))
    assert "3 samples (1 new)" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert_array_holds_the_images(tmp_path, 3)

    RGB_PNG.path(tmp_path, 0).unlink()
    sample.job(command(tmp_path, num_samples=2, batch_size=2))
    assert "2 samples (1 new)" in capsys.readouterr().out
    again = contents(tmp_path)
    assert_array_holds_the_images(tmp_path, 2)
    assert again["images/000001.png"] == first["images/000001.png"]
    assert again["manifest.json"] == first["manifest.json"]


def test_the_command_refuses_other_settings(tmp_path):
    sample.job(command(tmp_path, num_samples=1))
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="seed: 0 -> 1"):
        sample.job(command(tmp_path, num_samples=2, seed=1))
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_samples": 0}, "num_samples=0: name how many, or a picture"),
        ({"num_samples": -1}, "num_samples=-1: must be a whole number, at least 0"),
        ({"batch_size": "many"}, "batch_size=many: must be a whole number"),
        ({"sampler.steps": 1001}, "num_inference_steps"),
        ({"sampler": "euler"}, "sampler=euler"),
        ({"sampler": "ddpm", "sampler.eta": 0.5}, r"sampler\.eta=0\.5: ddpm has none"),
        ({"compile": "maybe"}, "^compile=maybe: must be true or false"),
        ({"tiling": 64}, "^tiling=64: must be true or false"),
        ({"slicing": "null"}, "^slicing=null: must be true or false"),
        ({"num_samples": "null"}, "^num_samples=null: must be a whole number, at least 0$"),
        ({"sampler.steps": 2**63}, "^sampler.steps=9223372036854775808: must be .* at most 9223372036854775807$"),
        ({"sampler.eta": "nan"}, "^sampler.eta=nan: must be a number at least 0 or null$"),
        ({"strength": "null"}, "^strength=null: must be"),
        ({"denoising": "true"}, "^denoising=true: must be a whole number, at least 0$"),
        ({"ckpt": "null"}, "^ckpt=null: must be given"),
        ({"reconstruct": ""}, "^reconstruct= must be given a value, or be left out$"),
        (
            {"sampler": "null"},
            "^sampler=null: there is no such option; there are: ddim, .*, flow_heun$",
        ),
        ({"+trainer.limit_predict_batches": 1}, "^trainer.limit_predict_batches=1: does nothing here; num_samples= "),
        ({"trainer.devices": "null"}, "^trainer.devices=null: must be"),
        ({"sampler.colour": "red"}, r"sampler\.colour=red: no such key"),
    ],
)
def test_the_command_refuses_what_cannot_be(tmp_path, settings, message):
    output = tmp_path / "output"
    with pytest.raises(ValueError, match=message) as error:
        sample.job(command(output, **settings))
    assert "\n" not in str(error.value)
    assert not (output / "images").exists()


def test_tiles_and_slices_are_settings(tmp_path, monkeypatch):
    seen = []
    decode = LDMPipeline.decode
    monkeypatch.setattr(
        LDMPipeline, "decode", lambda pipe, z: seen.append((pipe.vqvae.tiles, pipe.vqvae.slicing)) or decode(pipe, z)
    )
    sample.job(command(tmp_path / "plain", num_samples=2, batch_size=2))
    sample.job(command(tmp_path / "parts", num_samples=2, batch_size=2, tiling="true", slicing="true"))
    assert seen == [(None, False), (Tiles(64, 16), True)]
    images = [np.load(tmp_path / name / "samples.npz")["arr_0"].astype(int) for name in ("plain", "parts")]
    assert np.abs(images[0] - images[1]).max() <= 1  # 16 x 16 latents fit into a tile
    with pytest.raises(ValueError, match="tiling: False -> True"):
        sample.job(command(tmp_path / "plain", num_samples=3, tiling="true"))


@pytest.mark.soak
def test_compiled_networks_draw_the_same_images(tmp_path, monkeypatch):
    """In several starts too, bit for bit: each batch is full. Nothing of it is left in the process."""
    settings = {"num_samples": 5, "batch_size": 2, "trainer.precision": "32-true"}  # bfloat16 would round otherwise
    sample.job(command(tmp_path / "plain", **settings))
    compiled = {**settings, "compile": "true"}
    torch.compiler.reset()
    counters.clear()
    sample.job(command(tmp_path / "whole", **compiled))
    assert counters["stats"]["unique_graphs"] == 1  # the UNet, of one batch size
    assert counters["inductor"]["binary_folding"] + counters["inductor"]["mkldnn_conv_weight_pack_matcher_count"] > 0
    assert not torch._inductor.config.freezing
    sample.job(command(tmp_path / "parts", **{**compiled, "num_samples": 3}))
    sample.job(command(tmp_path / "parts", **compiled))
    assert contents(tmp_path / "whole") == contents(tmp_path / "parts")
    images = [np.load(tmp_path / name / "samples.npz")["arr_0"].astype(int) for name in ("plain", "whole")]
    assert np.abs(images[0] - images[1]).max() <= 1


def test_a_model_must_be_given_and_be_there(tmp_path):
    with pytest.raises(ConfigError, match="ckpt= must be given"):
        sample.job(["trainer=cpu"])
    with pytest.raises(ValueError, match="nowhere: no such file or folder"):
        sample.job([f"ckpt={tmp_path / 'nowhere'}", "trainer=cpu"])


def test_states_of_a_run_are_sampled_apart(tmp_path, capsys):
    for images in (8, 16):
        LDMPipeline.from_pretrained(MODEL).save_pretrained(tmp_path / f"diffusion/snapshots/{images:09d}")
    settings = ["trainer=cpu", "num_samples=1", "sampler.steps=1"]
    for source, images in ((f"{tmp_path}@8", 8), (tmp_path, 16)):
        sample.job([f"ckpt={source}", *settings])
        said, *_, drawn = capsys.readouterr().out.splitlines()
        state = f"{tmp_path}/diffusion/snapshots/{images:09d}"
        assert said == f"{source}: not finished, at {images} images: {state}"
        assert f"1 samples (1 new) in {tmp_path}/samples/ddim_1_eta0_seed0_at{images}: " in drawn
    with pytest.raises(ValueError, match=r"@2M: there is no such snapshot; there are 8, 16"):
        sample.job([f"ckpt={tmp_path}@2M", *settings])


def run_sample(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    script = [sys.executable, "sample.py", *arguments]
    done = subprocess.run(script, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_two_processes_write_what_one_does(tmp_path):
    ddp = {"trainer": "ddp", "trainer.accelerator": "cpu", "trainer.devices": 2}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    sample.job(command(tmp_path / "one"))
    torch.set_num_threads(threads)
    assert "3 samples (3 new)" in run_sample(*command(tmp_path / "two", **ddp))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")

    # fewer samples than processes
    RGB_PNG.path(tmp_path / "two", 1).unlink()
    assert "3 samples (1 new)" in run_sample(*command(tmp_path / "two", **ddp))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")

"""Sampling there: what the CPU draws, and no wait between two steps."""

import numpy as np
import pytest
import torch
from PIL import Image

from ldm_lab.diffusion import samplers
from ldm_lab.pipeline import LDMPipeline
from ldm_lab.sampling import pictures
from ldm_lab.training.planning.preview import show_reconstructions
from ldm_lab.utils import randomness
from sample import job
from tests.rehearsal import mps
from tests.rehearsal.accelerator import OVERRIDES
from tests.trained import undisturbed

MODEL = "tests/golden/diffusers/ldm_tiny"
SAMPLERS = [("ddim", 0.0), ("ddim", 1.0), ("ddpm", 0.0), ("dpm_solver", 0.0)]


def pipeline(name, device="cpu", eta=0.0):
    pipe = LDMPipeline.from_pretrained(MODEL, device=device)
    pipe.scheduler = samplers.choose(name, pipe.scheduler, eta)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def own():
    return [randomness.generator(0, "sample", index) for index in range(2)]


@pytest.mark.parametrize(("name", "eta"), SAMPLERS)
def test_samples_are_those_of_the_cpu_and_no_step_waits(name, eta, rehearsal):
    settings = {"eta": eta, "num_inference_steps": 4, "output_type": "pt"}
    expected = pipeline(name, eta=eta)(2, own(), **settings).images
    pipe, waits = pipeline(name, rehearsal.device, eta), []
    rehearsal.log.clear()
    pipe.unet.register_forward_hook(lambda *_: waits.append(len(rehearsal.log.waits)))
    found = pipe(2, own(), **settings).images
    assert found.device == rehearsal.device
    assert torch.allclose(found.cpu(), expected, atol=1e-4)
    assert [str(wait) for wait in rehearsal.log.waits[: waits[-1]]] == []
    assert mps.without(rehearsal.log.operations) == set()


def test_large_maps_in_tiles_and_images_one_by_one(rehearsal):
    latents = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    found = []
    for device in ("cpu", rehearsal.device):
        pipe = pipeline("ddim", device)
        pipe.vqvae.enable_tiling(size=12, overlap=4)
        pipe.vqvae.enable_slicing()
        with torch.no_grad():
            found.append(pipe.decode(latents[:, : pipe.vqvae.embed_dim].to(device)).cpu())
    assert torch.allclose(*found, atol=1e-4)
    assert mps.without(rehearsal.log.operations) == set()


def test_large_maps_are_decoded_without_a_wait(rehearsal):
    """The plain convolution runs there: nothing is made of numbers of the host."""
    pipe = pipeline("ddim", rehearsal.device)
    latents = torch.zeros(1, pipe.vqvae.embed_dim, 32, 32, device=rehearsal.device)
    rehearsal.log.clear()
    with torch.no_grad():
        pipe.decode(latents)
    assert [str(wait) for wait in rehearsal.log.waits] == []


@pytest.mark.slow
def test_pictures_are_those_of_the_cpu(rehearsal, tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / "image.png")
    wanted = pictures.PictureRequest(2, [0, 1], str(tmp_path / "image.png"), 0.6, str(tmp_path / "image.png"))
    found = {}
    for device in ("cpu", rehearsal.device):
        folder = tmp_path / str(device)
        for name in wanted.write(pipeline("ddim", device, 1.0), folder, seed=0, steps=3, eta=1.0):
            found.setdefault(name, []).append(np.asarray(Image.open(folder / name).convert("RGB")).astype(int))
    assert len(found) == 6
    for name, (one, other) in found.items():
        assert abs(one - other).max() <= (1 if name.endswith("png") else 30), name
    assert mps.without(rehearsal.log.operations) == set()


def test_the_preview_of_a_first_stage(rehearsal, tmp_path, capsys):
    from tests.training.stages import tiny

    module, data, _ = tiny("lsun_churches/diffusion")
    data.prepare_data()
    show_reconstructions(module.autoencoder, data, rehearsal.device, tmp_path / "sheet.png")
    assert "standard deviation" in capsys.readouterr().out


@pytest.mark.slow
def test_the_command_samples(rehearsal, tmp_path):
    images = {}
    for name, overrides in (("cpu", ["trainer=cpu", "trainer.precision=32-true"]), ("there", OVERRIDES)):
        common = [f"ckpt={MODEL}", "num_samples=3", "batch_size=2", "sampler.steps=3", f"output={tmp_path / name}"]
        with undisturbed():
            job([*common, "tiling=true", "slicing=true", *overrides])
        images[name] = [np.asarray(Image.open(p)).astype(int) for p in sorted((tmp_path / name / "images").glob("*"))]
    assert len(images["there"]) == 3
    assert all(abs(one - other).max() <= 1 for one, other in zip(*images.values(), strict=True))

"""Guides that fit and guides that do not, through the pipeline and through `sample.py`."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from ldm_lab import DDIMScheduler, LDMPipeline, UNet2DModel, VQModel
from ldm_lab.checkpoints.checkpoint import fingerprint
from ldm_lab.checkpoints.locate import State
from ldm_lab.diffusion.guidance import Converted, Guidance
from ldm_lab.diffusion.samplers import SAMPLERS
from ldm_lab.sampling import guide, pictures
from ldm_lab.sampling.files import RGB_PNG
from ldm_lab.sampling.generate import claim, default_folder, describe, identity
from ldm_lab.utils.errors import UserError
from ldm_lab.utils.images import to_unit
from ldm_lab.utils.randomness import generator, generators
from tests.helpers import contents
from tests.sampling.test_generate import SETTINGS, write_images
from tests.sampling.test_sample_command import MODEL, command


def load():
    pipe = LDMPipeline.from_pretrained(MODEL)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def perturbed(unet):
    """A network of the same kind that knows less: its weights are disturbed."""
    other = UNet2DModel.from_config(unet.config).eval()
    noise = torch.Generator().manual_seed(0)
    other.load_state_dict(
        {key: value + 0.02 * torch.randn(value.shape, generator=noise) for key, value in unet.state_dict().items()}
    )
    return other


@pytest.fixture(scope="module")
def pipe():
    pipe = load()
    pipe.guide = perturbed(pipe.unet)
    return pipe


@pytest.fixture(scope="module")
def weak(pipe, tmp_path_factory):
    """The folder of a model whose UNet is the guide."""
    folder = tmp_path_factory.mktemp("guide") / "weak"
    LDMPipeline(pipe.vqvae, pipe.guide, pipe.scheduler).save_pretrained(folder)
    return folder


def latents(pipe, steps=3, **guidance):
    return pipe(2, generators(0, [0, 1]), 0.0, steps, "latent", **guidance).images


# The pipeline.


def test_scale_one_is_the_model_alone_bit_for_bit(pipe):
    alone, calls = LDMPipeline(pipe.vqvae, pipe.unet, pipe.scheduler), []
    alone.set_progress_bar_config(disable=True)
    with pipe.guide.register_forward_hook(lambda *_: calls.append(1)) as _:
        plain = latents(alone)
        assert torch.equal(latents(pipe), plain)
        assert torch.equal(latents(pipe, guidance_scale=1, guidance_interval=[0.1, 9]), plain)
        assert torch.equal(latents(pipe, guidance_scale=2.0, guidance_interval=[1e5, 1e6]), plain)
        assert calls == []
        assert not torch.equal(latents(pipe, guidance_scale=2.0), plain)
        assert len(calls) == 3
    with pytest.raises(ValueError, match=r"^guidance_scale=2: there is no guide"):
        latents(alone, guidance_scale=2.0)
    with pytest.raises(ValueError, match=r"^guidance_interval="):
        latents(pipe, guidance_interval=[2, 1])


def test_scale_zero_is_the_guide_and_halves_meet(pipe):
    other = LDMPipeline(pipe.vqvae, pipe.guide, pipe.scheduler)
    other.set_progress_bar_config(disable=True)
    assert torch.equal(latents(pipe, guidance_scale=0), latents(other))
    one = [latents(each, steps=1, guidance_scale=w) for each, w in ((pipe, 0), (pipe, 0.5), (pipe, 1))]
    torch.testing.assert_close(one[1], (one[0] + one[2]) / 2)  # one step is linear in the prediction


def test_the_parts_travel_together_but_a_folder_holds_three(pipe, tmp_path, caplog):
    twin = LDMPipeline(**pipe.components)
    assert twin.guide is pipe.guide
    assert list(load().components) == ["vqvae", "unet", "scheduler"]
    pipe.save_pretrained(tmp_path)
    assert "the guide is not part of the folder" in caplog.text
    assert {path.name for path in tmp_path.iterdir()} == {"vqvae", "unet", "scheduler", "model_index.json"}
    assert LDMPipeline.from_pretrained(tmp_path).guide is None
    moved = LDMPipeline(**load().components, guide=perturbed(pipe.unet)).to("meta")
    assert {network.device.type for network in moved.networks.values()} == {"meta"}
    assert list(moved.networks) == ["vqvae", "unet", "guide"]


def test_the_switches_of_memory_know_the_guide(weak):
    pipe = load()
    guide.attach(pipe, str(weak))
    pipe.enable_vae_tiling()
    pipe.enable_vae_slicing()
    pipe.enable_model_cpu_offload(device="cpu")
    assert latents(pipe, guidance_scale=2.0).isfinite().all()


@pytest.mark.parametrize("change", [{"sample_size": 8}, {"in_channels": 4, "out_channels": 4}])
def test_a_guide_of_other_latents_is_refused_by_the_pipeline(pipe, change):
    key = next(iter(change))
    with pytest.raises(ValueError, match=f"^the guide has {key}={change[key]} and the model {key}="):
        LDMPipeline(pipe.vqvae, pipe.unet, pipe.scheduler, UNet2DModel.from_config(pipe.unet.config, **change))


# Guides by name.


def test_a_guide_of_another_prediction_type_is_converted(pipe, weak, tmp_path):
    """The guide is wrong about its type, so its samples are too, but both ways to them are the same."""
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type="v_prediction")
    LDMPipeline(pipe.vqvae, pipe.guide, scheduler).save_pretrained(tmp_path)
    other, alone = load(), LDMPipeline(pipe.vqvae, pipe.guide, scheduler)
    alone.set_progress_bar_config(disable=True)
    assert guide.attach(other, str(tmp_path)) == fingerprint(pipe.guide)
    assert isinstance(other.guide, Converted)
    torch.testing.assert_close(latents(other, guidance_scale=0), latents(alone), rtol=1e-3, atol=1e-3)
    assert fingerprint(other.guide.network) == guide.attach(load(), str(weak))


def other_autoencoder(pipe):
    return {"vqvae": VQModel.from_config(pipe.vqvae.config)}


def other_scale(pipe):
    vqvae = VQModel.from_config(pipe.vqvae.config, scaling_factor=0.5)
    vqvae.load_state_dict(pipe.vqvae.state_dict())
    return {"vqvae": vqvae}


def other_size(pipe):
    return {"unet": UNet2DModel.from_config(pipe.unet.config, sample_size=8)}


def other_scheduler(**settings):
    return lambda pipe: {"scheduler": DDIMScheduler.from_config(pipe.scheduler.config, **settings)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_autoencoder, "was trained on the latents of another autoencoder: take a guide"),
        (other_scale, "was trained with scaling_factor=0.5, the model with 1: take a guide"),
        (other_scheduler(num_train_timesteps=500), "has num_train_timesteps=500, the model 1000: take a guide"),
        (other_scheduler(beta_end=0.02), "was trained with other betas, so that alphas_cumprod differs: take"),
        (other_size, "the guide has sample_size=8 and the model sample_size=16: take a guide of the same latents"),
    ],
)
def test_a_guide_that_does_not_fit_is_refused_in_one_line(pipe, tmp_path, change, message):
    parts = {"vqvae": pipe.vqvae, "unet": pipe.unet, "scheduler": pipe.scheduler, **change(pipe)}
    LDMPipeline(**parts).save_pretrained(tmp_path)
    other = load()
    with pytest.raises(ValueError) as error:
        guide.attach(other, str(tmp_path))
    assert str(error.value).startswith(f"guide={tmp_path}: {message}")
    assert "\n" not in str(error.value)
    assert other.guide is None


def test_a_decoder_that_was_trained_further_is_no_other_autoencoder(pipe, weak, tmp_path):
    vqvae = VQModel.from_config(pipe.vqvae.config)
    vqvae.load_state_dict(pipe.vqvae.state_dict())
    vqvae.decoder.conv_out.bias.data += 1
    LDMPipeline(vqvae, pipe.guide, pipe.scheduler).save_pretrained(tmp_path)
    assert guide.attach(load(), str(tmp_path)) == guide.attach(load(), str(weak))


# Folders and manifests.


def test_each_guide_scale_and_interval_has_a_folder_of_its_own(tmp_path):
    guided = replace(SETTINGS, guide="0123456789abcdef", guidance=2.0, guidance_interval=[0.2, 5])
    state = State(tmp_path, tmp_path)
    assert default_folder(state, guided).name == "ddim_2_eta0_seed0_guided2_0.2_5_by01234567"
    changes = [
        {"guide": "1123"},
        {"guidance": 2.00000001},
        {"guidance_interval": [0.2, 6]},
        {"guidance_interval": [0.25, 5]},
        {"guidance_interval": None},
    ]
    others = [replace(guided, **change) for change in changes]
    assert len({default_folder(state, one) for one in (guided, SETTINGS, *others)}) == 7


def test_the_manifest_knows_the_guide(pipe, tmp_path):
    plain = describe(pipe, "runs/x", SETTINGS)
    guided = describe(pipe, "runs/x", replace(SETTINGS, guide="01", guidance=2.0, guidance_interval=[0, 1]), "runs/y")
    assert plain["evaluations"] == {"unet": 2, "guide": 0}
    assert (guided["evaluations"], guided["guide_ckpt"]) == ({"unet": 2, "guide": 1}, "runs/y")
    assert identity(guided) == identity({**guided, "guide_ckpt": "moved/y"}) != identity(plain)
    old = {key: value for key, value in plain.items() if key not in ("guide", "guidance", "guidance_interval")}
    assert identity(old) == identity(plain)  # samples of older versions are the same samples
    claim(tmp_path, old)
    write_images(tmp_path, 1)
    claim(tmp_path, plain)
    with pytest.raises(ValueError, match=r"\(guide: None -> 01; guidance: 1.0 -> 2.0; guidance_interval: "):
        claim(tmp_path, guided)


# The command.


def test_the_command_draws_what_the_pipeline_draws(pipe, weak, tmp_path, capsys):
    wanted = {"guide": weak, "guidance": 2, "guidance_interval": "[0,1]", "num_samples": 2}
    sample.job(command(tmp_path, **wanted, denoising=1, interpolate="[0,1]"))
    assert "a sample costs 2 evaluations of the UNet and 1 of the guide" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert (manifest["guide"], manifest["guide_ckpt"]) == (fingerprint(pipe.guide), str(weak))
    how = {"guidance_scale": 2.0, "guidance_interval": [0, 1]}
    for index in range(2):
        drawn = pipe(1, [generator(0, "sample", index)], 0.0, 2, **how).images[0]
        assert np.array_equal(np.asarray(drawn), np.asarray(Image.open(RGB_PNG.path(tmp_path, index))))
    assert {"denoising.png", "interpolation.png"} < set(contents(tmp_path))
    with pytest.raises(ValueError, match=r"holds samples of other settings .*guidance: 2.0 -> 3.0"):
        sample.job(command(tmp_path, **{**wanted, "guidance": 3}))


def test_pictures_are_of_the_guided_samples(pipe):
    how = Guidance(2.0, [0, 1])
    samples = pipe(2, generators(0, [0, 1]), 0.0, 2, "pt", guidance_scale=2.0, guidance_interval=[0, 1]).images
    frames = pictures.denoising(pipe, [0, 1], seed=0, steps=2, guidance=how)
    torch.testing.assert_close(to_unit(frames[-1]), samples, rtol=0, atol=0.02)
    legs = pictures.interpolation(pipe, [0, 1], seed=0, steps=2, guidance=how)
    torch.testing.assert_close(to_unit(legs[0, [0, -1]]), samples, rtol=0, atol=1e-3)
    image = torch.zeros(3, 32, 32)
    varied, plain = (
        pictures.variations(pipe, image, 1, 0.9, 0, 3, guidance=one) for one in (Guidance(2.0), Guidance())
    )
    assert not torch.equal(varied, plain)


def test_a_guide_at_scale_one_changes_nothing(tmp_path, caplog):
    sample.job(command(tmp_path / "plain", num_samples=1))
    sample.job(command(tmp_path / "guided", num_samples=1, guide="runs/nowhere", guidance_interval="[0.2,5]"))
    assert "guide=runs/nowhere: has no effect at guidance=1" in caplog.text
    assert contents(tmp_path / "plain") == contents(tmp_path / "guided")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guidance": 2}, "^guidance=2: needs guide=, a smaller or less trained model, e.g. .*@500k$"),
        ({"guidance": -1}, "^guidance=-1: must be a number at least 0$"),
        ({"guidance": "nan"}, "^guidance=nan: must be a number at least 0$"),
        ({"guidance": "null"}, "^guidance=null: must be a number at least 0$"),
        ({"guidance_interval": "[5,0.2]"}, r"^guidance_interval=\[5, 0\.2\]: must be two rising noise levels"),
        ({"guidance_interval": 3}, "^guidance_interval=3: must be two rising noise levels"),
        ({"guidance": 2, "guide": "/nowhere"}, "^/nowhere: no such file or folder$"),
    ],
)
def test_the_command_refuses_what_cannot_be(tmp_path, settings, message):
    output = tmp_path / "output"
    with pytest.raises(ValueError, match=message) as error:
        sample.job(command(output, **settings))
    assert "\n" not in str(error.value)
    assert not output.exists()


def test_models_of_flow_matching_guide_each_other(tmp_path):
    """At t = σ, as the path is straight; a model of another process is no guide for them."""
    pipe = load()
    flow = LDMPipeline(pipe.vqvae, pipe.unet, SAMPLERS["flow_euler"]())
    LDMPipeline(pipe.vqvae, perturbed(pipe.unet), flow.scheduler).save_pretrained(tmp_path / "guide")
    guide.attach(flow, str(tmp_path / "guide"))
    assert guide.evaluations(flow, 10, Guidance(2.0, [0.5, 2.0])) == {"unet": 10, "guide": 3}  # t = 0.6, 0.5, 0.4
    alone = flow(2, 0, num_inference_steps=4, output_type="pt").images
    assert not torch.equal(flow(2, 0, num_inference_steps=4, output_type="pt", guidance_scale=2.0).images, alone)
    with pytest.raises(UserError, match=rf"^guide={MODEL}: was trained with another process"):
        guide.attach(flow, str(MODEL))

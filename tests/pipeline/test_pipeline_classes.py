"""Pipelines of other classes than the published VQ models have: a Gaussian, a fixed number of heads, one's own."""

import copy
import json
import logging
import sys

import numpy as np
import pytest
import torch

from ldm_lab import AutoencoderKL, DDIMScheduler, LDMPipeline, UNet2DModel
from ldm_lab.checkpoints import checkpoint
from ldm_lab.models.autoencoders import load_autoencoder
from ldm_lab.training.diffusion_module import DiffusionModule
from ldm_lab.training.ema import EMA
from ldm_lab.utils.reading import LoadError
from ldm_lab.utils.terminal import said_once
from tests.models.weights import assert_equal_weights

VAE = {
    "block_out_channels": [8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "norm_num_groups": 4,
    "scaling_factor": 0.4,
}
UNET = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [8, 16],
    "down_block_types": ["AttnDownBlock2D", "ResnetDownsampleBlock2D"],
    "up_block_types": ["ResnetUpsampleBlock2D", "AttnUpBlock2D"],
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "resnet_time_scale_shift": "scale_shift",
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
}
HEADS = {**UNET, "attention_head_dim": None, "num_attention_heads": 2}


def build(unet=None, **parts):
    torch.manual_seed(0)
    defaults = {"vqvae": AutoencoderKL(**VAE).eval(), "scheduler": DDIMScheduler(clip_sample=False)}
    return quiet(LDMPipeline(unet=(unet or UNet2DModel(**UNET)).eval(), **{**defaults, **parts}))


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load(folder, **options):
    return quiet(LDMPipeline.from_pretrained(folder, **options))


def draw(pipe):
    return pipe(2, torch.Generator().manual_seed(3), num_inference_steps=3, output_type="np").images


def index(folder):
    return json.loads((folder / "model_index.json").read_text())


@pytest.fixture
def diffusers():
    return pytest.importorskip("diffusers")


# A first stage with a Gaussian.


def test_a_gaussian_there_and_back(tmp_path):
    pipe = build()
    pipe.save_pretrained(tmp_path)
    assert index(tmp_path)["vqvae"] == ["diffusers", "AutoencoderKL"]
    back = load(tmp_path)
    assert type(back.vqvae) is AutoencoderKL
    assert_equal_weights(back.vqvae, pipe.vqvae)
    assert np.array_equal(draw(back), draw(pipe))


def test_a_gaussian_is_decoded_unscaled():
    pipe = build()
    latents = torch.randn(1, 4, 8, 8)
    assert torch.equal(pipe.decode(latents), pipe.vqvae.decode(latents / 0.4).sample)


def test_diffusers_draws_the_same_from_a_gaussian(diffusers, tmp_path):
    ours = build()
    ours.save_pretrained(tmp_path / "ours")
    theirs = quiet(diffusers.LDMPipeline.from_pretrained(tmp_path / "ours"))
    np.testing.assert_allclose(draw(ours), draw(theirs), atol=1e-4, rtol=0)
    theirs.save_pretrained(tmp_path / "theirs")
    np.testing.assert_allclose(draw(load(tmp_path / "theirs")), draw(ours), atol=1e-4, rtol=0)


def test_channels_that_do_not_fit_a_gaussian():
    with pytest.raises(ValueError, match=r"in_channels=3 and out_channels=4, but the latents .* have 4 channels"):
        build(unet=UNet2DModel(**{**UNET, "in_channels": 3}))


# A fixed number of heads.


def test_heads_there_and_back(tmp_path):
    pipe = build(unet=UNet2DModel(**HEADS))
    pipe.save_pretrained(tmp_path)
    assert index(tmp_path)["unet"] == ["ldm_lab", "UNet2DModel"]
    back = load(tmp_path)
    assert back.unet.config == pipe.unet.config
    assert np.array_equal(draw(back), draw(pipe))


def test_diffusers_refuses_heads(diffusers, tmp_path):
    build(unet=UNet2DModel(**HEADS)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="cannot be loaded"):
        diffusers.LDMPipeline.from_pretrained(tmp_path)


def test_saving_says_once_what_diffusers_refuses(tmp_path, caplog):
    said_once.clear()
    with caplog.at_level(logging.WARNING):
        build().save_pretrained(tmp_path / "for both")
        assert caplog.messages == []
        for name in ("first", "second"):
            build(unet=UNet2DModel(**HEADS)).save_pretrained(tmp_path / name)
    (line,) = caplog.messages
    assert line.startswith("unet is written as ldm_lab.UNet2DModel, which diffusers does not have")


# One's own classes.

PLUGIN = '''
import torch
from torch import nn

from ldm_lab.diffusion.ddim import DDIMScheduler
from ldm_lab.models.outputs import UNet2DOutput
from ldm_lab.models.vq_model import VQModel
from ldm_lab.models.pretrained import PretrainedModel, register_to_config


class Flat(PretrainedModel):
    """A network of one layer that takes its input as it is."""

    @register_to_config
    def __init__(self, sample_size=8, in_channels=3, out_channels=3, kernel=3):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2)

    def forward(self, sample, timestep):
        return UNet2DOutput(self.conv(sample))

    def zero_residuals(self):
        pass


class Halved(VQModel):
    def decode(self, *args, **kwargs):
        output = super().decode(*args, **kwargs)
        output.sample = output.sample / 2
        return output


class Slow(DDIMScheduler):
    pass


def helper():
    pass


class Stranger:
    pass
'''


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of this name that lies on the path; it is forgotten again."""
    folder = tmp_path / "site" / "my_pkg"
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / "networks.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(folder.parent)
    yield "my_pkg.networks"
    forget()


def forget():
    for name in [name for name in sys.modules if name.split(".")[0] == "my_pkg"]:
        del sys.modules[name]


@pytest.fixture
def own(package):
    """A pipeline of nothing but one's own classes."""
    module = __import__(package, fromlist=["*"])
    torch.manual_seed(0)
    vqvae = module.Halved(block_out_channels=[8], norm_num_groups=4, num_vq_embeddings=16).eval()
    return quiet(LDMPipeline(vqvae, module.Flat(kernel=1).eval(), module.Slow(clip_sample=False)))


def test_own_classes_there_and_back(own, tmp_path):
    own.save_pretrained(tmp_path / "folder")
    assert {name: index(tmp_path / "folder")[name] for name in own.components} == {
        "vqvae": ["my_pkg.networks", "Halved"],
        "unet": ["my_pkg.networks", "Flat"],
        "scheduler": ["my_pkg.networks", "Slow"],
    }
    images = draw(own)
    forget()
    back = load(tmp_path / "folder", plugins=("my_pkg",))
    assert [type(part).__name__ for part in back.components.values()] == ["Halved", "Flat", "Slow"]
    assert back.unet.config.kernel == 1
    assert np.array_equal(draw(back), images)


def test_nothing_is_imported_that_is_not_a_plugin(own, tmp_path):
    own.save_pretrained(tmp_path / "folder")
    forget()
    for plugins in ((), ("my_pkg.networks",), ("other",)):
        with pytest.raises(
            LoadError, match=r"model_index.json: vqvae is my_pkg.networks.Halved: add plugins=\[my_pkg\]$"
        ):
            load(tmp_path / "folder", plugins=plugins)
    with pytest.raises(LoadError, match=r"config.json: the first stage is my_pkg.networks.Halved: add plugins="):
        load_autoencoder(tmp_path / "folder")
    assert "my_pkg" not in sys.modules


def test_own_classes_in_a_training_checkpoint(own, tmp_path):
    parts = {"objective": None, "ema": EMA, "optimizer": None, "schedule": None}
    module = DiffusionModule(own.unet, own.vqvae, own.scheduler, **parts)
    state = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(state)
    checkpoint.save(state, tmp_path / "last.ckpt")
    expected = copy.deepcopy(module.ema.model)
    forget()
    for read in (load, load_autoencoder):
        with pytest.raises(LoadError, match=r"last.ckpt: vqvae is my_pkg.networks.Halved: add plugins=\[my_pkg\]$"):
            read(tmp_path / "last.ckpt")
    assert_equal_weights(load(tmp_path / "last.ckpt", plugins=["my_pkg"]).unet, expected)


def test_an_own_first_stage_from_its_folder(own, tmp_path):
    own.vqvae.save_pretrained(tmp_path / "final")
    loaded = load_autoencoder(tmp_path, plugins=["my_pkg"])
    assert_equal_weights(loaded, own.vqvae)
    latents = torch.randn(1, 3, 8, 8)
    assert torch.equal(loaded.decode(latents).sample, own.vqvae.decode(latents).sample)


def test_diffusers_finds_no_weights_of_own_classes(own, diffusers, tmp_path):
    own.save_pretrained(tmp_path)
    with pytest.raises(OSError, match="no file named diffusion_pytorch_model"):
        diffusers.VQModel.from_pretrained(tmp_path / "vqvae", low_cpu_mem_usage=False)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_pkg.networks.Stranger", "my_pkg.networks has no such subclass of PretrainedModel or Scheduler"),
        ("my_pkg.networks.helper", "my_pkg.networks has no such subclass of PretrainedModel or Scheduler"),
        ("my_pkg.networks.torch", "my_pkg.networks has no such subclass of PretrainedModel or Scheduler"),
        ("my_pkg.networks.Absent", "my_pkg.networks has no such subclass of PretrainedModel or Scheduler"),
        ("my_pkg.absent.Flat", "which cannot be imported: No module named 'my_pkg.absent'"),
        ("diffusers.Flat", "known are "),
        ("Flat", "known are "),
    ],
)
def test_what_is_no_class_of_the_plugin(package, name, message):
    with pytest.raises(LoadError) as error:
        checkpoint.class_named(name, {"diffusers.VQModel": None}, ["my_pkg", "diffusers"], "here: unet")
    assert str(error.value).startswith(f"here: unet is {name}")
    assert message in str(error.value)


def test_a_plugin_that_is_not_installed():
    with pytest.raises(LoadError, match=r"here is nowhere_pkg.Net, which cannot be imported: No module named 'nowhere"):
        checkpoint.class_named("nowhere_pkg.Net", {}, ["nowhere_pkg"], "here")

"""The networks against those of diffusers: recorded outputs, and the library itself where it is installed."""

import inspect
import json
import random

import pytest
import torch
from safetensors.torch import load_file

from ldm_lab.models.kl_model import AutoencoderKL
from ldm_lab.models.unet import UNet2DModel
from ldm_lab.models.vq_model import VQModel
from tests.helpers import GOLDEN, assert_close_relative
from tests.models.weights import assert_equal_weights

FOLDERS = ("ldm_tiny", "ldm_tiny_legacy")
META = json.loads((GOLDEN / "diffusers" / "golden.json").read_text())


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "diffusers" / "golden.safetensors")


def load(kind, folder):
    subfolder = {VQModel: "vqvae", UNet2DModel: "unet"}[kind]
    return kind.from_pretrained(GOLDEN / "diffusers" / folder, subfolder=subfolder)


@pytest.mark.parametrize("kind", [VQModel, UNet2DModel])
def test_folders_of_today_and_of_2022_hold_the_same(kind):
    today, legacy = (load(kind, folder) for folder in FOLDERS)
    assert_equal_weights(today, legacy)
    assert today.num_parameters() == META["params"][{VQModel: "vqvae", UNet2DModel: "unet"}[kind]]


@torch.no_grad()
@pytest.mark.parametrize("folder", FOLDERS)
def test_recorded_outputs_of_the_autoencoder(golden, folder):
    model = load(VQModel, folder)
    latents = model.encode(golden["vq.input"]).latents
    assert_close_relative(latents, golden["vq.encode"])
    quantized, loss, info = model.quantize(latents)
    assert torch.equal(info.indices.view_as(golden["vq.indices"]), golden["vq.indices"])
    assert len(info.indices.unique()) == META["vq_codes_used"]
    assert_close_relative(quantized, golden["vq.quantized"])
    assert_close_relative(loss.view(1), golden["vq.loss_legacy_beta"])
    assert_close_relative(model.decode(latents).sample, golden["vq.decode"])
    unquantized = model.decode(latents, force_not_quantize=True).sample
    assert_close_relative(unquantized, golden["vq.decode_force_not_quantize"])
    assert_close_relative(model(golden["vq.input"]).sample, golden["vq.forward"])


@torch.no_grad()
@pytest.mark.parametrize("folder", FOLDERS)
def test_recorded_outputs_of_the_unet(golden, folder):
    model = load(UNet2DModel, folder)
    x = golden["unet.input"]
    for timestep, expected in zip(golden["unet.timesteps"], golden["unet.output"], strict=True):
        assert_close_relative(model(x, timestep).sample, expected)
    assert_close_relative(model(x, golden["unet.timesteps_vector"]).sample, golden["unet.output_vector_t"])


@pytest.fixture(scope="module")
def diffusers():
    return pytest.importorskip("diffusers")


def parameters(function):
    return {name: parameter.default for name, parameter in inspect.signature(function).parameters.items()}


@pytest.mark.parametrize("ours", [VQModel, AutoencoderKL, UNet2DModel])
def test_arguments_and_defaults(diffusers, ours):
    theirs = getattr(diffusers, ours.__name__)
    expected = parameters(theirs.__init__)
    if ours is VQModel:
        expected["scaling_factor"] = 1.0  # deliberately
    if ours is UNet2DModel:
        expected["num_attention_heads"] = None  # our own
    assert list(parameters(ours.__init__).items()) == list(expected.items())
    for method in ("encode", "decode", "forward"):
        if hasattr(theirs, method):
            assert parameters(getattr(ours, method)) == parameters(getattr(theirs, method))


VQ_CASES = {
    "plain": {"mid_block_add_attention": False, "layers_per_block": 2},
    "attention": {
        "down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
        "up_block_types": ["AttnUpDecoderBlock2D", "UpDecoderBlock2D"],
    },
    "other widths": {"in_channels": 1, "out_channels": 2, "latent_channels": 5, "vq_embed_dim": 4},
}
KL_CASES = {
    "plain": {"mid_block_add_attention": False, "layers_per_block": 2, "latent_channels": 3},
    "attention": VQ_CASES["attention"],
    "no convolutions": {"use_quant_conv": False, "use_post_quant_conv": False},
}
RESAMPLED = {"downsample_type": "resnet", "upsample_type": "resnet"}
RESAMPLED_BLOCKS = {
    "down_block_types": ["ResnetDownsampleBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "ResnetUpsampleBlock2D"],
}
UNET_CASES = {
    "one head": {"attention_head_dim": None, "layers_per_block": 2},
    "time": {"freq_shift": 1, "flip_sin_to_cos": False, "time_embedding_dim": 24},
    "no attention in the middle": {"add_attention": False, "downsample_padding": 0},
    "groups": {"attn_norm_num_groups": 2, "norm_eps": 1e-3, "in_channels": 4, "out_channels": 6},
    "prefix of 2022": {"down_block_types": ["UNetResDownBlock2D", "UNetResAttnDownBlock2D"]},
    "scale and shift": {"resnet_time_scale_shift": "scale_shift"},
    "scale and shift, all norms": {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 4},
    "resampling in residual blocks": {**RESAMPLED_BLOCKS, **RESAMPLED, "resnet_time_scale_shift": "scale_shift"},
    "resampling in plain blocks": RESAMPLED_BLOCKS,
    "resampling in blocks with attention": {
        **RESAMPLED,
        "down_block_types": ["AttnDownBlock2D"] * 2,
        "up_block_types": ["AttnUpBlock2D"] * 2,
    },
    "resampling that plain blocks ignore": RESAMPLED,
    "heads that do not divide the width": {"attention_head_dim": 5},
    "no block in the middle": {"mid_block_type": None},
    "random frequencies": {"time_embedding_type": "fourier", "resnet_time_scale_shift": "scale_shift"},
    "images in [0, 1]": {"center_input_sample": True},
}


def autoencoder_arguments(case):
    types = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    return {**types, "block_out_channels": [8, 16], "norm_num_groups": 4, "scaling_factor": 1.5, **case}


def unet_arguments(case):
    types = {"down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"]}
    sizes = {"block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 4}
    return {**types, **sizes, **UNET_CASES[case]}


@torch.no_grad()
@pytest.mark.parametrize("case", VQ_CASES)
def test_autoencoders_go_there_and_back(diffusers, case, tmp_path):
    torch.manual_seed(0)
    ours = VQModel(**autoencoder_arguments(VQ_CASES[case])).eval()
    torch.nn.init.normal_(ours.quantize.embedding.weight)
    images = torch.randn(2, ours.config.in_channels, 16, 16)
    ours.save_pretrained(tmp_path / "ours")
    theirs = diffusers.VQModel.from_pretrained(tmp_path / "ours", low_cpu_mem_usage=False)
    assert_close_relative(ours.encode(images).latents, theirs.encode(images).latents)
    assert_close_relative(ours(images).sample, theirs(images).sample)
    assert theirs.config.scaling_factor == 1.5

    theirs.save_pretrained(tmp_path / "theirs")
    back = VQModel.from_pretrained(tmp_path / "theirs")
    assert back.config == ours.config
    assert_equal_weights(back, ours)


@torch.no_grad()
@pytest.mark.parametrize("case", KL_CASES)
def test_autoencoders_with_a_gaussian_go_there_and_back(diffusers, case, tmp_path):
    torch.manual_seed(0)
    ours = AutoencoderKL(**autoencoder_arguments(KL_CASES[case])).eval()
    images = torch.randn(2, 3, 16, 16)
    ours.save_pretrained(tmp_path / "ours")
    theirs = diffusers.AutoencoderKL.from_pretrained(tmp_path / "ours", low_cpu_mem_usage=False)
    own, reference = (model.encode(images).latent_dist for model in (ours, theirs))
    for name in ("mean", "std", "var", "logvar"):
        assert_close_relative(getattr(own, name), getattr(reference, name))
    assert_close_relative(own.mode(), reference.mode())
    assert_close_relative(own.kl(), reference.kl())
    for options in ({}, {"sample_posterior": True}):
        own, reference = (
            model(images, **options, generator=torch.Generator().manual_seed(5)).sample for model in (ours, theirs)
        )
        assert_close_relative(own, reference)

    theirs.save_pretrained(tmp_path / "theirs")
    back = AutoencoderKL.from_pretrained(tmp_path / "theirs")
    assert back.config == ours.config
    assert_equal_weights(back, ours)


@torch.no_grad()
@pytest.mark.parametrize("case", UNET_CASES)
def test_unets_go_there_and_back(diffusers, case, tmp_path):
    torch.manual_seed(0)
    ours = UNet2DModel(**unet_arguments(case)).eval()
    x, timesteps = torch.randn(2, ours.config.in_channels, 8, 8), torch.tensor([3, 800])
    ours.save_pretrained(tmp_path / "ours")
    theirs = diffusers.UNet2DModel.from_pretrained(tmp_path / "ours", low_cpu_mem_usage=False)
    for trainable in (False, True):
        assert ours.num_parameters(trainable) == theirs.num_parameters(trainable)
    assert_close_relative(ours(x, timesteps).sample, theirs(x, timesteps).sample)

    theirs.save_pretrained(tmp_path / "theirs")
    back = UNet2DModel.from_pretrained(tmp_path / "theirs")
    assert back.config == ours.config
    assert_equal_weights(back, ours)


def some_sizes(draw, levels):
    """What all networks have in common; the widths of neighbouring levels may be equal, rise or fall."""
    return {
        "block_out_channels": [draw.choice([8, 16, 24]) for _ in range(levels)],
        "layers_per_block": draw.choice([1, 2, 3]),
        "norm_num_groups": draw.choice([1, 2, 4, 8]),
        "in_channels": draw.choice([1, 3, 4]),
        "out_channels": draw.choice([1, 3, 4]),
        "sample_size": draw.choice([16, (16, 24)]),
    }


def some_unet(draw):
    levels = draw.choice([1, 2, 3, 4])
    down, up = ["DownBlock2D", "AttnDownBlock2D"], ["UpBlock2D", "AttnUpBlock2D"]
    return {
        **some_sizes(draw, levels),
        "down_block_types": [draw.choice([*down, "ResnetDownsampleBlock2D"]) for _ in range(levels)],
        "up_block_types": [draw.choice([*up, "ResnetUpsampleBlock2D"]) for _ in range(levels)],
        "attention_head_dim": draw.choice([None, 1, 3, 4, 7, 8]),
        "mid_block_type": draw.choice([None, "UNetMidBlock2D"]),
        "time_embedding_type": draw.choice(["positional", "fourier"]),
        "center_input_sample": draw.choice([False, True]),
        "time_embedding_dim": draw.choice([None, 20]),
        "flip_sin_to_cos": draw.choice([True, False]),
        "freq_shift": draw.choice([0, 1]),
        "downsample_padding": draw.choice([0, 1]),
        "downsample_type": draw.choice(["conv", "resnet"]),
        "upsample_type": draw.choice(["conv", "resnet"]),
        "dropout": draw.choice([0.0, 0.1]),
        "attn_norm_num_groups": draw.choice([None, 4]),
        "norm_eps": draw.choice([1e-5, 1e-3]),
        "resnet_time_scale_shift": draw.choice(["default", "scale_shift"]),
        "add_attention": draw.choice([True, False]),
        "num_train_timesteps": draw.choice([None, 1000]),
    }


def some_autoencoder(draw):
    levels = draw.choice([1, 2, 3, 4])
    return {
        **some_sizes(draw, levels),
        "down_block_types": [draw.choice(["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]) for _ in range(levels)],
        "up_block_types": [draw.choice(["UpDecoderBlock2D", "AttnUpDecoderBlock2D"]) for _ in range(levels)],
        "latent_channels": draw.choice([2, 3, 5]),
        "mid_block_add_attention": draw.choice([True, False]),
    }


@torch.no_grad()
@pytest.mark.parametrize("seed", range(12))
def test_unets_of_any_architecture(diffusers, seed):
    torch.manual_seed(seed)
    arguments = some_unet(random.Random(seed))
    theirs, ours = diffusers.UNet2DModel(**arguments).eval(), UNet2DModel(**arguments).eval()
    ours.load_weights(theirs.state_dict(), origin="diffusers")
    x, timesteps = torch.randn(2, ours.config.in_channels, 16, 24), torch.tensor([3, 900])
    assert_close_relative(ours(x, timesteps).sample, theirs(x, timesteps).sample)


@torch.no_grad()
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("kind", [VQModel, AutoencoderKL])
def test_autoencoders_of_any_architecture(diffusers, kind, seed):
    torch.manual_seed(seed)
    draw = random.Random(seed)
    arguments = some_autoencoder(draw)
    if kind is VQModel:
        arguments |= {"num_vq_embeddings": draw.choice([7, 16]), "vq_embed_dim": draw.choice([None, 2, 4])}
    theirs, ours = getattr(diffusers, kind.__name__)(**arguments).eval(), kind(**arguments).eval()
    if kind is VQModel:
        torch.nn.init.normal_(theirs.quantize.embedding.weight)
    ours.load_weights(theirs.state_dict(), origin="diffusers")
    images = torch.randn(2, ours.config.in_channels, 16, 24)
    encoded = theirs.encode(images)
    latents = encoded.latents if kind is VQModel else encoded.latent_dist.mode()
    assert_close_relative(ours.latents(images), latents)
    assert_close_relative(ours.decode(latents).sample, theirs.decode(latents).sample)

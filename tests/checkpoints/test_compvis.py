"""The networks against recorded outputs of CompVis/latent-diffusion, through the key map."""

import json

import pytest
import torch
from safetensors.torch import load_file

from ldm_lab.checkpoints.compvis import autoencoder_state, kl_config, unet_config, unet_state, vq_config
from ldm_lab.models.kl_model import AutoencoderKL
from ldm_lab.models.layers.embedding import sinusoid
from ldm_lab.models.unet import UNet2DModel
from ldm_lab.models.vq_model import VQModel
from ldm_lab.utils.reading import LoadError
from tests.helpers import GOLDEN, assert_close_relative

FOLDER = GOLDEN / "compvis"
META = json.loads((FOLDER / "meta.json").read_text())
IO = load_file(FOLDER / "io.safetensors")

# The published configs (models/first_stage_models, configs/latent-diffusion)
VQ_F4 = {
    "double_z": False,
    "z_channels": 3,
    "resolution": 256,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 128,
    "ch_mult": [1, 2, 4],
    "num_res_blocks": 2,
    "attn_resolutions": [],
    "dropout": 0.0,
}
CELEBAHQ = {
    "image_size": 64,
    "in_channels": 3,
    "out_channels": 3,
    "model_channels": 224,
    "attention_resolutions": [8, 4, 2],
    "num_res_blocks": 2,
    "channel_mult": [1, 2, 3, 4],
    "num_head_channels": 32,
}
KL_F4 = {**VQ_F4, "double_z": True}
CHURCHES = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 192,
    "attention_resolutions": [1, 2, 4, 8],
    "num_res_blocks": 2,
    "channel_mult": [1, 2, 2, 4, 4],
    "num_heads": 8,
    "use_scale_shift_norm": True,
    "resblock_updown": True,
}


def floats(name):
    return {key: value.float() for key, value in load_file(FOLDER / name).items()}


def build_vq(state, arch):
    config = vq_config(**arch)
    model = VQModel(**config).eval()
    model.load_weights(autoencoder_state(state, config), origin="golden")
    return model


def build_unet(state, arch):
    config = unet_config(arch)
    model = UNet2DModel(**config).eval()
    model.load_weights(unet_state(state, config), origin="golden")
    return model


@pytest.fixture
def vq():
    return build_vq(floats("vq_state.safetensors"), META["arch"]["vq"])


@pytest.fixture
def unet():
    return build_unet(floats("unet_state.safetensors"), META["arch"]["unet"])


@torch.no_grad()
def test_encoder_and_quantizer(vq):
    latents = vq.encode(IO["in.image"]).latents
    assert_close_relative(latents, IO["vq.prequant"])
    output = vq.quantize(latents)
    assert torch.equal(output.info.indices.view_as(IO["vq.indices"]), IO["vq.indices"])
    assert_close_relative(output.quantized, IO["vq.quantized"])
    assert_close_relative(output.loss, IO["vq.quant_loss_legacy"])
    assert_close_relative(output.info.perplexity, IO["loss.at_start.ae.perplexity"])
    assert len(output.info.indices.unique()) == IO["loss.at_start.ae.cluster_usage"]
    vq.quantize.legacy = False
    assert_close_relative(vq.quantize(latents).loss, IO["vq.quant_loss_nonlegacy"])


@torch.no_grad()
def test_decoder(vq):
    latents, indices = IO["in.latent_for_decode"], IO["vq.decode_indices_in"]
    assert torch.equal(vq.quantize(latents).info.indices.view_as(indices), indices)
    assert_close_relative(vq.decode(latents).sample, IO["vq.decode_interface"])
    assert_close_relative(vq.decode(latents, force_not_quantize=True).sample, IO["vq.decode_no_quant"])
    assert_close_relative(vq(IO["in.image"]).sample, IO["vq.reconstruction"])
    shape = (*IO["vq.indices"].shape, vq.embed_dim)
    codes = vq.quantize.get_codebook_entry(IO["vq.indices"].flatten(), shape)
    assert_close_relative(codes, IO["vq.codebook_vectors"])
    assert_close_relative(vq.decode(IO["ddim10.eta1.final"]).sample, IO["ddim10.eta1.final_decoded"])


def test_gradients_of_reconstruction_and_codebook(vq):
    """Before the discriminator starts, the loss is the L1 distance (and a constant) plus the quantizer's."""
    output = vq(IO["in.image"])
    distance = (output.sample - IO["in.image"]).abs().mean()
    constant = META["scalars"]["loss.before_start.ae.p_loss"]
    assert_close_relative(distance.detach() + constant, IO["loss.before_start.ae.rec_loss"])
    assert_close_relative(output.commit_loss.detach(), IO["loss.before_start.ae.quant_loss"])
    (distance + output.commit_loss).backward()
    for name in ("decoder.conv_out", "encoder.conv_in", "quant_conv", "quantize.embedding"):
        gradient = vq.get_parameter(f"{name}.weight").grad
        assert_close_relative(gradient, IO[f"loss.before_start.grad.{name}.weight"])


@torch.no_grad()
def test_unet(unet):
    width = META["arch"]["unet"]["model_channels"]
    assert_close_relative(sinusoid(IO["in.unet_t"], width), IO["unet.time_embedding_raw"])
    assert_close_relative(unet(IO["in.unet_x"], IO["in.unet_t"]).sample, IO["unet.out"])
    for x, t, expected in zip(IO["in.unet_x"], IO["in.unet_t"], IO["unet.out"], strict=True):
        assert_close_relative(unet(x[None], t).sample[0], expected)


@torch.no_grad()
def test_unet_like_that_of_churches():
    """Scale and shift, resampling in residual blocks, and a number of heads."""
    unet = build_unet(floats("unet_churches_like_state.safetensors"), META["arch"]["unet_churches_like"])
    assert_close_relative(unet(IO["in.unet_x"], IO["in.unet_t"]).sample, IO["unet_churches_like.out"])


@torch.no_grad()
def test_autoencoder_with_a_gaussian():
    config = kl_config(**META["arch"]["kl"])
    model = AutoencoderKL(**config).eval()
    model.load_weights(autoencoder_state(floats("kl_state.safetensors"), config), origin="golden")
    posterior = model.encode(IO["in.kl_image"]).latent_dist
    assert_close_relative(torch.cat([posterior.mean, posterior.logvar], dim=1), IO["kl.moments"])
    assert_close_relative(posterior.mean, IO["kl.mean"])
    assert_close_relative(posterior.std, IO["kl.std"])
    assert_close_relative(posterior.kl(), IO["kl.kl"])
    assert_close_relative(model.latents(IO["in.kl_image"], IO["in.kl_noise"]), IO["kl.sample_from_noise"])
    assert_close_relative(model.decode(IO["in.kl_latent"]).sample, IO["kl.decode"])


@torch.no_grad()
def test_networks_inside_a_whole_checkpoint():
    """Another architecture: one level of the UNet without attention, so that its upsampler sits elsewhere."""
    state = torch.load(FOLDER / "model.ckpt", weights_only=True)["state_dict"]
    expected = load_file(FOLDER / "ckpt_io.safetensors")

    def below(prefix):
        return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}

    unet = build_unet(below("model.diffusion_model."), META["arch"]["ckpt_unet"])
    assert_close_relative(unet(expected["in.unet_x"], expected["in.unet_t"]).sample, expected["unet_raw"])
    vq = build_vq(below("first_stage_model."), META["arch"]["ckpt_vq"])
    scaled = state["scale_factor"] * vq.encode(expected["in.image"]).latents
    assert_close_relative(scaled, expected["latent_scaled"])


@pytest.mark.parametrize(
    ("name", "build", "config", "translate"),
    [
        ("unet", UNet2DModel, unet_config(META["arch"]["unet"]), unet_state),
        ("unet_churches_like", UNet2DModel, unet_config(META["arch"]["unet_churches_like"]), unet_state),
        ("vq", VQModel, vq_config(**META["arch"]["vq"]), autoencoder_state),
        ("kl", AutoencoderKL, kl_config(**META["arch"]["kl"]), autoencoder_state),
    ],
)
def test_every_tensor_is_used_once(name, build, config, translate):
    state = floats(f"{name}_state.safetensors")
    renamed, count = translate(state, config), sum(value.numel() for value in state.values())
    assert sum(value.numel() for value in renamed.values()) == count == META["params"].get(name, count)
    assert renamed.keys() == build(**config).state_dict().keys()


@torch.no_grad()
def test_recorded_codes_are_safe_from_rounding(vq):
    """The two nearest codes lie far enough apart everywhere that equal indices can be asked for."""
    for latents, name in ((vq.encode(IO["in.image"]).latents, "prequant"), (IO["in.latent_for_decode"], "decode_in")):
        points = latents.movedim(1, -1).flatten(0, 2)  # (B, C, h, w) -> (B*h*w, C)
        squared = torch.cdist(points.double(), vq.quantize.embedding.weight.double()).square()
        nearest, second = squared.topk(2, largest=False).values.unbind(1)
        assert (second - nearest).min().item() == pytest.approx(META["argmin_margin"][name], rel=0.1)


@pytest.mark.parametrize(
    ("translate", "config", "key"),
    [
        (autoencoder_state, vq_config(**META["arch"]["vq"]), "encoder.down.0.attn.9.q.weight"),
        (autoencoder_state, vq_config(**META["arch"]["vq"]), "loss.discriminator.main.0.weight"),
        (autoencoder_state, kl_config(**META["arch"]["kl"]), "quantize.embedding.weight"),
        (unet_state, unet_config(META["arch"]["unet"]), "input_blocks.99.0.in_layers.0.weight"),
        (unet_state, unet_config(META["arch"]["unet"]), "label_emb.weight"),
    ],
)
def test_a_tensor_without_counterpart_is_an_error(translate, config, key):
    with pytest.raises(LoadError, match=f"CompVis tensor '{key}' has no counterpart"):
        translate({key: torch.zeros(1)}, config)


def test_heads_that_do_not_fit_the_tensors_are_an_error():
    config = unet_config({**META["arch"]["unet"], "num_head_channels": 24})
    with pytest.raises(LoadError, match="attention_head_dim=24 does not divide the 32 channels"):
        unet_state(floats("unet_state.safetensors"), config)
    config = unet_config({**META["arch"]["unet_churches_like"], "num_heads": 5})
    with pytest.raises(LoadError, match="num_attention_heads=5 does not divide the 32 channels"):
        unet_state(floats("unet_churches_like_state.safetensors"), config)


def test_the_published_unet_config():
    """What the published diffusers folder of the same weights says (its defaults left out)."""
    assert unet_config(CELEBAHQ) == {
        "sample_size": 64,
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
        "block_out_channels": [224, 448, 672, 896],
        "layers_per_block": 2,
        "dropout": 0.0,
        "attention_head_dim": 32,
    }


@pytest.mark.parametrize(
    ("change", "codes", "count"),
    [
        ({}, 8192, 55_322_782),
        ({"attn_type": "none"}, 8192, 53_219_486),
        ({"ch_mult": [1, 2, 2, 4], "attn_resolutions": [32], "z_channels": 4}, 16384, 67_717_295),
    ],
)
def test_the_published_autoencoder_configs(change, codes, count):
    ddconfig = {**VQ_F4, **change}
    with torch.device("meta"):
        assert VQModel(**vq_config(ddconfig, ddconfig["z_channels"], codes)).num_parameters() == count


@pytest.mark.parametrize(
    ("change", "count"), [({}, 55_312_063), ({"ch_mult": [1, 2, 4, 4], "z_channels": 4}, 83_653_863)]
)
def test_the_published_autoencoders_with_a_gaussian(change, count):
    ddconfig = {**KL_F4, **change}
    config = kl_config(ddconfig, ddconfig["z_channels"])
    with torch.device("meta"):
        assert AutoencoderKL(**config).num_parameters() == count
    assert config["scaling_factor"] == 1.0  # none was published with the autoencoder alone


def test_the_published_unet_config_of_churches():
    config = unet_config(CHURCHES)
    with torch.device("meta"):
        assert UNet2DModel(**config).num_parameters() == 294_966_916
    assert config["down_block_types"] == ["AttnDownBlock2D"] * 4 + ["ResnetDownsampleBlock2D"]
    assert config["up_block_types"] == ["ResnetUpsampleBlock2D"] + ["AttnUpBlock2D"] * 4
    assert (config["num_attention_heads"], config["attn_norm_num_groups"]) == (8, 32)


def test_the_size_of_a_head_wins_over_their_number():
    config = unet_config({**CELEBAHQ, "num_heads": 8})
    assert config == unet_config(CELEBAHQ)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_head_channels": -1}, "unet_config: either num_head_channels or num_heads must be given"),
        (
            {"num_head_channels": -1, "num_heads": 8, "num_heads_upsample": 4},
            "unet_config: num_heads_upsample=4 is not supported; num_heads=8 is",
        ),
        ({"use_new_attention_order": True}, "unet_config: use_new_attention_order=True is not supported; False is"),
        ({"num_classes": 10}, "unet_config: num_classes=10 is not supported; None is"),
        ({"colour": "red"}, "unet_config: colour='red' is not a key that is understood"),
    ],
)
def test_a_unet_that_ours_cannot_express_is_an_error(change, message):
    with pytest.raises(LoadError) as error:
        unet_config({**CELEBAHQ, **change})
    assert str(error.value) == message


def test_an_autoencoder_that_ours_cannot_express_is_an_error():
    with pytest.raises(LoadError, match="ddconfig: double_z=True is not supported; False is"):
        vq_config(KL_F4, 3, 8192)
    with pytest.raises(LoadError, match="ddconfig: double_z=False is not supported; True is"):
        kl_config(VQ_F4, 3)
    with pytest.raises(LoadError, match=r"^embed_dim=4 is not supported; z_channels=3 is$"):
        kl_config(KL_F4, 4)
    with pytest.raises(LoadError, match="ddconfig: the key 'ch_mult' is missing"):
        vq_config({key: value for key, value in VQ_F4.items() if key != "ch_mult"}, 3, 8192)

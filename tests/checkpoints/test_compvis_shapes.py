"""The architecture of a CompVis checkpoint, read off its tensors, for those that come without a YAML file."""

import logging

import pytest
import torch
import yaml
from safetensors.torch import load_file

from ldm_lab import AutoencoderKL, DDIMScheduler, LDMPipeline, UNet2DModel, VQModel
from ldm_lab.checkpoints.compvis import autoencoder, kl_config, shapes, unet, unet_config, unet_state, vq_config
from ldm_lab.utils.reading import LoadError
from tests.checkpoints.test_compvis import CELEBAHQ, CHURCHES, KL_F4, VQ_F4
from tests.checkpoints.test_compvis_checkpoint import CHECKPOINT, IO, META, STATE, original_config
from tests.helpers import GOLDEN, assert_close_relative

FOLDER = GOLDEN / "compvis"


def compvis_tensors(model, modules):
    """A network of ours under CompVis's names: the renaming, turned around."""
    theirs = {
        ".".join(part for part in (ours, our_part) if part): ".".join(part for part in (their, part) if part)
        for their, ours, parts in modules
        for part, our_part in parts.items()
    }
    state = {}
    for key, value in model.state_dict().items():
        name, _, kind = key.rpartition(".")
        if name in theirs:
            state[f"{theirs[name]}.{kind}"] = value
        elif name.endswith(".to_q"):
            state[f"{theirs[name[:-1] + 'qkv']}.{kind}"] = torch.cat([value] * 3)
    return state


def on_meta(kind, config):
    with torch.device("meta"):
        return kind(**config)


SMALL_UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": 2,
    "channel_mult": [1, 2],
    "attention_resolutions": [],
    "num_head_channels": 32,
}


@pytest.mark.parametrize(
    "params",
    [
        CELEBAHQ,
        CHURCHES,
        SMALL_UNET,
        {**SMALL_UNET, "channel_mult": [1], "num_res_blocks": 3},
        {**SMALL_UNET, "channel_mult": [1], "num_res_blocks": 1, "attention_resolutions": [1]},
        {**SMALL_UNET, "channel_mult": [1, 2, 2, 3], "num_res_blocks": 1, "attention_resolutions": [1, 4]},
        {**SMALL_UNET, "resblock_updown": True, "num_res_blocks": 3, "attention_resolutions": [2]},
        {**SMALL_UNET, "use_scale_shift_norm": True, "num_head_channels": -1, "num_heads": 8, "in_channels": 3},
        {**SMALL_UNET, "channel_mult": [1, 1, 1], "resblock_updown": True, "attention_resolutions": [1, 2, 4]},
    ],
)
def test_a_unet_is_known_by_its_tensors(params):
    config = unet_config(params)
    state = compvis_tensors(on_meta(UNet2DModel, config), unet._modules(config))
    assert unet_config(shapes.unet(state, params["image_size"])) == config


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"attn_type": "none"},
        {"ch_mult": [1, 2, 2, 4], "attn_resolutions": [32], "z_channels": 4},
        {"ch_mult": [1, 2], "attn_resolutions": [256, 128], "num_res_blocks": 1, "ch": 32},
        {"ch_mult": [1], "num_res_blocks": 3, "in_channels": 1, "out_ch": 1},
    ],
)
@pytest.mark.parametrize("codebook", [True, False])
def test_an_autoencoder_is_known_by_its_tensors(change, codebook):
    if codebook:
        dimensions = {"embed_dim": 5, "n_embed": 77}
        config = vq_config({**VQ_F4, **change}, **dimensions)
        state = compvis_tensors(on_meta(VQModel, config), autoencoder._modules(config, "quantize.embedding"))
    else:
        dimensions = {"embed_dim": change.get("z_channels", 3)}
        config = kl_config({**KL_F4, **change}, **dimensions)
        state = compvis_tensors(on_meta(AutoencoderKL, config), autoencoder._modules(config))
    found = shapes.first_stage(state)
    assert found["target"] == ("VQModel" if codebook else "AutoencoderKL")
    params = found["params"]
    translate = vq_config if codebook else kl_config
    assert translate(**params) == config


@pytest.mark.parametrize("name", ["vq", "kl", "ckpt_vq", "ckpt_unet", "unet", "unet_churches_like"])
def test_the_recorded_networks_but_for_their_heads(name):
    if name.startswith("ckpt"):
        prefix = "first_stage_model." if name == "ckpt_vq" else "model.diffusion_model."
        state = {key.removeprefix(prefix): value for key, value in STATE.items() if key.startswith(prefix)}
    else:
        state = load_file(FOLDER / f"{name}_state.safetensors")
    arch = META["arch"][name]
    if "unet" in name:
        found = unet_config(shapes.unet(state, arch["image_size"]))
        heads = {key: value for key, value in unet_config(arch).items() if key.endswith(("heads", "head_dim"))}
        assert {**found, **heads} == unet_config(arch)
        UNet2DModel.from_tensors(found, unet_state(state, found), origin=name)
        return
    translate = kl_config if name == "kl" else vq_config
    sizes = arch["ddconfig"]["resolution"]
    found = shapes.first_stage(state)["params"]
    found["ddconfig"]["attn_resolutions"] = [
        side * sizes // shapes.RESOLUTION for side in found["ddconfig"]["attn_resolutions"]
    ]
    found["ddconfig"]["resolution"] = sizes
    assert translate(**found) == translate(**arch)


# Whole checkpoints.


def load(path, **options):
    pipe = LDMPipeline.from_single_file(path, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def alone(tmp_path):
    """A copy of the checkpoint with nothing beside it, perhaps changed."""

    def copy(**changes):
        state = {**STATE, **changes}
        path = tmp_path / "published.ckpt"
        torch.save({"state_dict": {key: value for key, value in state.items() if value is not None}}, path)
        return path

    return copy


def test_without_a_config_the_tensors_tell_and_a_line_says_what_they_leave_open(alone, caplog):
    with caplog.at_level(logging.WARNING):
        pipe = load(alone())
    (line,) = [record.getMessage() for record in caplog.records]
    assert "num_head_channels=32" in line
    assert "images of 256 pixels" in line
    assert "scale_factor" not in line
    assert pipe.vqvae.config.scaling_factor == STATE["scale_factor"].item()
    scheduler = load(CHECKPOINT, original_config=None).scheduler
    assert scheduler.config == pipe.scheduler.config
    assert isinstance(scheduler, DDIMScheduler)
    assert scheduler.config.beta_schedule == "scaled_linear"
    assert scheduler.config.trained_betas is None  # their ends say all
    assert (scheduler.config.steps_offset, scheduler.config.set_alpha_to_one) == (1, False)


@torch.no_grad()
def test_with_the_heads_that_were_assumed_it_is_the_same_model(alone, tmp_path):
    """All but the split into heads is read right: with a YAML file of that split, the same predictions follow."""
    content = original_config()
    params = content["model"]["params"]["unet_config"]["params"]
    content["model"]["params"]["unet_config"]["params"] = {**params, "num_head_channels": 32}
    (tmp_path / "heads.yaml").write_text(yaml.safe_dump(content))
    read, given = load(alone()), load(CHECKPOINT, original_config=tmp_path / "heads.yaml")
    assert_close_relative(
        read.unet(IO["in.unet_x"], IO["in.unet_t"]).sample, given.unet(IO["in.unet_x"], IO["in.unet_t"]).sample
    )
    assert_close_relative(read.decode(IO["ddim10_eta0_ema_latent"]), IO["ddim10_eta0_ema_image"])


@torch.no_grad()
@pytest.mark.parametrize("name", ["config.yaml", "published.yaml"])
def test_the_config_beside_the_file_is_found(alone, tmp_path, caplog, name):
    path = alone()
    (tmp_path / name).write_text(yaml.safe_dump(original_config()))
    with caplog.at_level(logging.WARNING):
        pipe = load(path)
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}: its architecture is that of {tmp_path / name}"
    ]
    assert_close_relative(pipe.unet(IO["in.unet_x"], IO["in.unet_t"]).sample, IO["unet_ema"])


def test_another_yaml_file_beside_it_is_passed_over(alone, tmp_path):
    path = alone()
    (tmp_path / "config.yaml").write_text("seed: 1\nmodel: vq\n")
    assert load(path).unet.config.attention_head_dim == 32


def test_scale_that_is_not_there_is_one_and_is_said(alone, caplog):
    with caplog.at_level(logging.WARNING):
        assert load(alone(scale_factor=None)).vqvae.config.scaling_factor == 1.0
    assert "scale_factor=1" in caplog.records[0].getMessage()


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("betas", "holds no betas: give its YAML file as original_config="),
        ("model.diffusion_model.out.2.weight", "read off the tensors: there is no 'out.2.weight'"),
        ("first_stage_model.encoder.conv_in.weight", "read off the tensors: there is no 'encoder.conv_in.weight'"),
    ],
)
def test_what_cannot_be_read_off_is_refused(alone, key, message):
    path = alone(**{key: None})
    with pytest.raises(LoadError) as error:
        load(path)
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_first_stage_needs_no_config(alone, caplog):
    with caplog.at_level(logging.WARNING):
        model = VQModel.from_single_file(alone())
    assert not caplog.records  # its tensors tell all
    assert_close_relative(STATE["scale_factor"] * model.encode(IO["in.image"]).latents, IO["latent_scaled"])
    with pytest.raises(LoadError, match="holds a first stage of class VQModel, not AutoencoderKL"):
        AutoencoderKL.from_single_file(alone())


def test_tensors_of_something_else(tmp_path):
    path = tmp_path / "other.ckpt"
    torch.save({"state_dict": {"layer.weight": torch.zeros(2, 2)}}, path)
    with pytest.raises(LoadError, match=r"there is no 'encoder.conv_in.weight'"):
        VQModel.from_single_file(path)
    with pytest.raises(LoadError, match="not a latent diffusion model"):
        LDMPipeline.from_single_file(path)

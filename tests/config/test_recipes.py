"""Recipes and model configs hold the published values; `debug=tiny` keeps the kind of each recipe."""

import pytest
import torch

from ldm_lab.config.compose import Recipe, build, build_all
from tests.trained import RECIPES


def compose(*overrides):
    return Recipe.parse(list(overrides)).compose()


def target(node):
    return node._target_.rpartition(".")[2]


def parameters(node):
    with torch.device("meta"):
        return build(node, "").num_parameters()


# Of stage 2: iterations, batch, learning rate, warm-up iterations, loss, last beta, scale, parameters.
LDM_4 = {"warmup": 0, "loss": "L2Loss", "beta_end": 0.0195, "scale": 1.0, "parameters": 274_056_163}
PUBLISHED = {
    "celebahq": {"steps": 410_000, "batch": 48, "lr": 9.6e-5, "flip": False, **LDM_4},
    "ffhq": {"steps": 635_000, "batch": 42, "lr": 8.4e-5, "flip": False, **LDM_4},
    "lsun_bedrooms": {"steps": 1_900_000, "batch": 48, "lr": 9.6e-5, "flip": True, **LDM_4},
    "lsun_churches": {
        "steps": 500_000, "batch": 96, "lr": 5e-5, "flip": True, "warmup": 10_000, "loss": "L1Loss",
        "beta_end": 0.0155, "scale": "measure", "parameters": 294_966_916,
    },
}  # fmt: skip


@pytest.mark.parametrize("recipe", RECIPES)
def test_stage_2_is_the_published_one(recipe):
    published, config = PUBLISHED[recipe], compose(f"experiment={recipe}", "data.root=/images")[1]
    model, batch = config.model, published["batch"]
    assert (config.name, config.data.image_size, config.data.flip) == (recipe, 256, published["flip"])
    assert (config.data.global_batch_size, config.max_images) == (batch, published["steps"] * batch)
    assert (target(model.optimizer), model.optimizer.weight_decay) == ("AdamW", 0.01)
    assert model.optimizer.lr == pytest.approx(published["lr"])
    assert model.schedule.warmup_images == published["warmup"] * batch
    schedule = build(model.schedule, "")
    assert schedule(model.schedule.warmup_images) == schedule(config.max_images) == 1
    assert build(model.ema, "", network=torch.nn.Linear(1, 1)).max_decay == 0.9999
    assert target(model.objective.loss) == published["loss"]
    assert target(model.objective.weighting) == "PlainWeighting"
    assert target(model.objective.timesteps) == "UniformTimesteps"
    scheduler = build(model.scheduler, "").config
    assert (scheduler.num_train_timesteps, scheduler.clip_sample) == (1000, False)
    assert (scheduler.beta_schedule, scheduler.beta_start) == ("scaled_linear", 0.0015)
    assert (scheduler.beta_end, scheduler.prediction_type) == (published["beta_end"], "epsilon")
    assert model.scaling_factor == published["scale"]
    assert parameters(model.unet) == published["parameters"]
    assert (model.unet.dropout, config.trainer.gradient_clip_val) == (0.0, None)


# Of stage 1: parameters, those of the discriminator, batch, disc_start, disc_weight, channels of the latents.
FIRST_STAGES = {
    "vq_f4": (55_322_782, 2_765_633, 8, 0, 0.75, 3),
    "vq_f8": (67_717_295, 663_361, 10, 1, 0.6, 4),
    "kl_f4": (55_312_063, 2_765_633, 10, 50_001, 0.5, 3),
    "kl_f8": (83_653_863, 2_765_633, 4, 50_001, 0.5, 4),
}


@pytest.mark.parametrize("name", FIRST_STAGES)
def test_first_stages_are_the_published_ones(name):
    size, discriminator, batch, start, weight, channels = FIRST_STAGES[name]
    model = compose("experiment=celebahq/autoencoder", f"model={name}")[0].model
    loss, latents = model.loss, model.autoencoder
    assert parameters(latents) == size
    with torch.device("meta"):
        assert sum(p.numel() for p in build(loss.discriminator, "").parameters()) == discriminator
    assert (target(model.optimizer), list(model.optimizer.betas)) == ("Adam", [0.5, 0.9])
    assert model.optimizer.lr == pytest.approx(4.5e-6 * batch)
    assert build(model.schedule, "")(0) == 1
    assert (loss.adversarial.start_images, loss.adversarial.weight) == (start * batch, weight)
    assert (loss.adversarial.max_weight, loss.adversarial.ramp_images) == (1e4, 0)
    assert (target(loss.perceptual), loss.perceptual_weight) == ("LPIPS", 1.0)
    assert latents.latent_channels == channels
    kind = "KLAutoencoder" if name.startswith("kl") else "Autoencoder"
    assert (target(model), target(loss)) == (f"{kind}Module", f"{kind}Loss")
    if name.startswith("kl"):
        assert loss.kl_weight == 1e-6
    else:
        assert (loss.codebook_weight, model.legacy_codebook_loss) == (1.0, True)
        assert latents.num_vq_embeddings == {"vq_f4": 8192, "vq_f8": 16384}[name]


@pytest.mark.parametrize("recipe", RECIPES)
def test_stage_1_is_trained_as_long_as_the_published_one(recipe):
    churches = recipe == "lsun_churches"
    config, diffusion = compose(f"experiment={recipe}")
    batch, steps = (4, 246_803) if churches else (8, 533_066)
    assert (config.data.global_batch_size, config.max_images) == (batch, batch * steps)
    size, _, _, start, _, channels = FIRST_STAGES["kl_f8" if churches else "vq_f4"]
    assert parameters(config.model.autoencoder) == size
    assert config.model.loss.adversarial.start_images == start * batch < config.max_images
    assert config.data.flip is PUBLISHED[recipe]["flip"]
    assert diffusion.model.unet.in_channels == diffusion.model.unet.out_channels == channels
    assert (config.data.image_size, config.trainer.gradient_clip_val) == (256, None)


def test_the_unet_of_churches_has_its_own_blocks():
    unet = compose("experiment=lsun_churches/diffusion")[0].model.unet
    assert (unet.num_attention_heads, unet.attn_norm_num_groups, unet.resnet_time_scale_shift) == (8, 32, "scale_shift")
    assert (unet.downsample_type, unet.upsample_type) == ("resnet", "resnet")
    assert (unet.down_block_types[-1], unet.up_block_types[0]) == ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")


def test_tiny_churches_stay_what_they_are():
    autoencoder, diffusion = compose("experiment=lsun_churches", "debug=tiny")
    assert (target(autoencoder.model), target(autoencoder.model.loss)) == ("KLAutoencoderModule", "KLAutoencoderLoss")
    unet = build(diffusion.model.unet, "").config
    assert (unet.num_attention_heads, unet.attn_norm_num_groups, unet.resnet_time_scale_shift) == (8, 8, "scale_shift")
    assert (unet.downsample_type, unet.upsample_type, unet.in_channels) == ("resnet", "resnet", 4)
    assert (diffusion.model.scaling_factor, target(diffusion.model.objective.loss)) == ("measure", "L1Loss")


@pytest.mark.parametrize("recipe", ["avatars", "celebahq", "ffhq", "lsun_bedrooms"])
def test_tiny_codebooks_are_tiny(recipe):
    model = compose(f"experiment={recipe}/autoencoder", "debug=tiny")[0].model
    assert model.autoencoder.num_vq_embeddings == model.codebook.num_codes == 32
    assert model.codebook.init_step == 1
    mine = compose(f"experiment={recipe}/autoencoder", "debug=tiny", "model.autoencoder.num_vq_embeddings=64")[0].model
    assert mine.codebook.num_codes == 64


def test_either_kind_of_autoencoder_suits_a_recipe():
    """`callbacks` need not follow the model."""
    configs = compose("experiment=celebahq", "model=kl_f4")
    assert [target(config.model) for config in configs] == ["KLAutoencoderModule", "DiffusionModule"]
    assert parameters(configs[0].model.autoencoder) == 55_312_063
    assert build_all(configs[0].callbacks, "callbacks")

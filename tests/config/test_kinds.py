"""Every key has a value of its kind, or one line names it before anything is trained."""

import re

import pytest
import torch

from ldm_lab.config import checks, files, kinds
from ldm_lab.config.compose import Recipe, compose_sample, plain
from ldm_lab.config.stages import try_training
from ldm_lab.utils import nested
from ldm_lab.utils.errors import UserError
from ldm_lab.utils.nested import find, flatten

# Which keys `null` says something about; what it says stands beside them in configs/.
MAY_BE_NULL = {
    "ema", "model.power_ema",
    "autoencoder", "init", "snapshots", "data.root", "data.batch_size", "data.val_batch_size", "trainer.precision",
    "trainer.gradient_clip_val", "trainer.max_epochs", "trainer.check_val_every_n_epoch", "trainer.log_every_n_steps",
    "trainer.num_sanity_val_steps", "trainer.benchmark", "trainer.enable_progress_bar", "trainer.enable_model_summary",
    "trainer.enable_checkpointing", "model.codebook.init_step", "model.optimizer.fused", "model.loss.discriminator",
    "model.loss.adversarial", "model.loss.perceptual.weights", "model.unet.in_channels", "model.unet.out_channels",
    "model.unet.attention_head_dim", "model.unet.num_attention_heads", "model.unet.attn_norm_num_groups",
    "callbacks.sample_grid.neighbours", "callbacks.snapshots.every_images", "callbacks.evaluate.every_images",
    "callbacks.evaluate.weights", "logger.wandb.summaries",
    "original_config", "guide", "guidance_interval", "output", "variation", "reconstruct",
    "sampler.eta", "max_pixels", "data.max_pixels", "preview_channels", "data.preview_channels", "data.value_range",
    "paths.cache_limit", "paths.mirror", "data.cache_limit", "data.cache_dir",
}  # fmt: skip
# Whole groups, where a key may be switched off; words of W&B's own; and what is only there for others to refer to.
FREE = ("callbacks.", "logger.", "where_known", "weightless", "logger.wandb.tags")


def check(config):
    checks.check(config)
    kinds.check(config)


def with_value(config, key, value):
    """The config with another value at a key, and whatever took its own from there."""
    before = find(config, key)
    name = key.rpartition(".")[2]
    follow = [k for k in flatten(config) if k.rpartition(".")[2] == name and find(config, k) == before] + [key]
    changed = _copy(config)
    for one in follow if "." not in key.removeprefix("data.") else [key]:
        parent, _, last = one.rpartition(".")
        (find(changed, parent) if parent else changed)[last] = value
    return changed


def _copy(tree):
    return {key: _copy(value) for key, value in tree.items()} if isinstance(tree, dict) else tree


def inner(tree, prefix=""):
    """All keys that hold something, nodes among them."""
    for key, value in tree.items():
        if not key.startswith("_"):
            yield f"{prefix}{key}"
            yield from inner(value, f"{prefix}{key}.") if isinstance(value, dict) else ()


def accepted(config):
    """The keys at which `null` is not refused; a refusal is one line that begins with a key."""
    taken = set()
    for key in inner(config):
        said = refusal(with_value(config, key, None))
        assert said is None or ("\n" not in said and said.startswith(f"{key}=null: ")), f"{key}: {said}"
        taken |= {key} if said is None else set()
    return taken


def refusal(config):
    try:
        check(config)
    except UserError as error:
        return str(error)
    return None


STAGES = [
    f"{recipe}/{stage}" for recipe in ("avatars", "celebahq", "folder", "lsun_churches") for stage in files.STAGES
]


@pytest.fixture(scope="module")
def composed():
    """The stages' configs, and that of sampling."""
    found = {}
    for stage in STAGES:
        root = [] if stage.startswith("avatars") else ["data.root=x"]
        (config,) = Recipe.parse([f"experiment={stage}", *root]).compose()
        found[stage] = plain(config)
    return {**found, "sample": plain(compose_sample(["ckpt=x"]))}


@pytest.mark.parametrize("name", [*STAGES, "sample"])
def test_null_is_refused_at_every_key_that_does_not_declare_it(composed, name):
    check(composed[name])
    groups = {"data", "model", "trainer", "callbacks", "logger", "paths", "sampler"}  # refused as options, see configs
    nulls = {key for key in accepted(composed[name]) if not key.startswith(FREE) and key not in groups}
    assert {re.sub(r"module\.((train|val)_set\.)?", "", key) for key in nulls} <= MAY_BE_NULL


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", 2**64), ("seed", 1.0), ("seed", True), ("data.num_workers", -1), ("data.num_workers", "two"),
        ("data.batch_size", 2.5),
        ("data.flip", "yes"), ("data.flip", 1), ("data.val_fraction", float("nan")), ("data.val_fraction", True),
        ("callbacks.sample_grid.every_images", 0), ("callbacks.sample_grid.steps", 0), ("callbacks.health.patience", 0),
        ("callbacks.sample_grid.raw", -1), ("callbacks.sample_grid.seed", 2.5), ("callbacks.sample_grid.images", "all"),
        ("model.ema.decay", "slow"), ("model.ema.decay", float("inf")), ("model.unet.dropout", False),
        ("model.optimizer.weight_decay", "no"), ("model.optimizer.lr", float("nan")), ("model.optimizer.lr", 0),
        ("model.schedule.warmup_images", 1.5), ("model.schedule.warmup_images", -1), ("model.scaling_factor", -1.0),
        ("trainer.num_nodes", 0),
        ("trainer.gradient_clip_val", -0.5), ("trainer.log_every_n_steps", "ten"), ("logger.wandb.offline", "maybe"),
        ("name", 2024), ("paths.runs", 1.5), ("resume", None),
    ],
)  # fmt: skip
def test_other_values_are_refused_in_one_line(composed, key, value):
    with pytest.raises(UserError) as error:
        check(with_value(composed["celebahq/diffusion"], key, value))
    assert str(error.value).startswith(f"{key}={nested.shown(value)}: ")
    assert "\n" not in str(error.value)


def test_a_batch_size_may_be_found_by_trial(composed):
    config = composed["celebahq/diffusion"]
    check(with_value(config, "data.batch_size", "auto"))
    with pytest.raises(UserError, match=r"^data\.batch_size=most: must be a whole number, at least 1 or auto or null$"):
        check(with_value(config, "data.batch_size", "most"))


def test_what_an_annotation_leaves_open_is_the_constructors_to_judge(composed):
    config = composed["celebahq/diffusion"]
    for key, value in (
        ("data.image_size", [64, 32]),
        ("trainer.devices", "auto"),
        ("trainer.strategy", {"_target_": "x"}),
    ):
        kinds.check(with_value(config, key, value))
    kinds.check({"mine": {"_target_": "torch.nn.Linear", "in_features": 3, "bias": False}})
    kinds.check({"mine": {"_target_": "tests.callbacks.Journal", "folder": None}})  # not annotated
    kinds.check({"mine": {"_target_": "no.such.Thing", "x": None}})  # whoever builds it says so


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.optimizer.betas=[0.5,1.5]", "model.optimizer: .*beta"),
        ("+model.optimizer.speed=3", "model.optimizer: .*speed"),
        ("model.ema.decay=1.5", "model.ema.decay=1.5: must be"),
    ],
)
def test_what_would_fail_in_stage_2_is_tried_before_stage_1(override, message):
    (config,) = Recipe.parse(["experiment=avatars/diffusion", override]).compose()
    kinds.check(plain(config))
    with torch.device("meta"), pytest.raises(UserError, match=message):
        try_training(config.model)

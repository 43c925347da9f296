"""What a command line becomes: experiments compose, overrides reach the right stage, mistakes end in one line."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from ldm_lab.config import CONFIGS, ConfigError, Recipe, build, build_all, experiments, plain

ROOT = Path(__file__).resolve().parents[1]


def compose(*overrides):
    return Recipe.parse(list(overrides)).compose()


def one_line_error(*overrides):
    with pytest.raises(ConfigError) as error:
        compose(*overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- experiments


@pytest.mark.parametrize("tiny", [(), ("debug=tiny",)])
@pytest.mark.parametrize("experiment", experiments())
def test_every_experiment_composes_and_its_parts_can_be_built(experiment, tiny):
    for config in compose(f"experiment={experiment}", *tiny):
        network = config.model[{"autoencoder": "autoencoder", "diffusion": "unet"}[config.stage]]
        with torch.device("meta"):
            assert build(network, "network").num_parameters() > 0
        assert build(config.model.optimizer, "optimizer", params=[torch.nn.Parameter(torch.zeros(1))]).param_groups
        assert 0 <= build(config.model.schedule, "schedule")(config.max_images // 2) <= 1
        assert build_all(config.callbacks, "callbacks")
        assert config.paths.stage == f"{config.paths.runs}/{config.name}/{config.stage}"
        yaml.safe_dump(plain(config))  # plain data, as it is written to the run folder


def test_a_bare_command_is_the_demo():
    assert Recipe.parse([]) == Recipe.parse(["experiment=avatars"])
    assert Recipe.parse([]).stages == ("avatars/autoencoder", "avatars/diffusion")
    assert Recipe.parse(["experiment=celebahq/diffusion"]).stages == ("celebahq/diffusion",)


@pytest.fixture(scope="module")
def celebahq():
    return compose("experiment=celebahq", "data.root=/images")


def test_celebahq_has_the_published_networks(celebahq):
    autoencoder, diffusion = (config.model for config in celebahq)
    with torch.device("meta"):
        assert build(autoencoder.autoencoder, "").num_parameters() == 55_322_782
        assert build(diffusion.unet, "").num_parameters() == 274_056_163
        discriminator = build(autoencoder.loss.discriminator, "")
    assert sum(p.numel() for p in discriminator.parameters()) == 2_765_633


def test_celebahq_has_the_published_first_stage(celebahq):
    config = celebahq[0]
    assert (config.data.global_batch_size, config.data.image_size, config.data.flip) == (8, 256, False)
    assert config.max_images == 533_066 * 8
    assert config.model.optimizer._target_ == "torch.optim.Adam"
    assert (config.model.optimizer.lr, list(config.model.optimizer.betas)) == (pytest.approx(4.5e-6 * 8), [0.5, 0.9])
    assert build(config.model.schedule, "")(0) == 1
    assert config.model.autoencoder.num_vq_embeddings == 8192
    assert config.model.legacy_codebook_loss is True
    loss = config.model.loss
    assert loss.perceptual._target_.endswith(".LPIPS")
    assert (loss.perceptual_weight, loss.codebook_weight) == (1.0, 1.0)
    adversarial = loss.adversarial
    assert (adversarial.weight, adversarial.start_images, adversarial.max_weight) == (0.75, 0, 1e4)
    assert (loss.discriminator.channels, loss.discriminator.num_layers) == (64, 3)
    assert config.trainer.gradient_clip_val is None


def test_celebahq_has_the_published_diffusion(celebahq):
    config = celebahq[1]
    assert (config.data.global_batch_size, config.data.image_size, config.data.flip) == (48, 256, False)
    assert config.max_images == 410_000 * 48
    assert config.model.optimizer._target_ == "torch.optim.AdamW"
    assert (config.model.optimizer.lr, config.model.optimizer.weight_decay) == (pytest.approx(2e-6 * 48), 0.01)
    assert build(config.model.schedule, "")(0) == 1
    assert build(config.model.ema, "", network=torch.nn.Linear(1, 1)).max_decay == 0.9999
    scheduler = build(config.model.scheduler, "").config
    assert (scheduler.beta_schedule, scheduler.beta_start, scheduler.beta_end) == ("scaled_linear", 0.0015, 0.0195)
    assert (scheduler.num_train_timesteps, scheduler.prediction_type, scheduler.clip_sample) == (1000, "epsilon", False)
    kinds = [config.model.objective[part]._target_.rsplit(".", 1)[1] for part in ("loss", "weighting", "timesteps")]
    assert kinds == ["L2Loss", "PlainWeighting", "UniformTimesteps"]
    assert config.model.scaling_factor == 1.0
    assert config.model.unet.dropout == 0.0
    assert config.trainer.gradient_clip_val is None


# --- what wins


def test_an_experiment_wins_over_the_defaults_of_its_groups(celebahq):
    group = yaml.safe_load((CONFIGS / "data/image_folder.yaml").read_text())
    assert group["global_batch_size"] not in (8, 48)
    assert [config.data.global_batch_size for config in celebahq] == [8, 48]
    assert [config.data.module.global_batch_size for config in celebahq] == [8, 48]  # what is built follows


def test_debug_wins_over_the_experiment_and_the_command_line_over_all():
    for config in compose("experiment=celebahq", "debug=tiny"):
        assert (config.max_images, config.data.image_size, config.trainer.accelerator) == (64, 32, "cpu")
        assert config.logger.wandb.offline is True
        assert config.max_images / config.checkpoint_every >= 4
        assert "drawn" in config.data.module.train_set._target_
    for config in compose("max_images=8", "debug=tiny", "trainer=gpu", "experiment=celebahq"):
        assert (config.max_images, config.trainer.accelerator) == (8, "gpu")


# --- which stage an override is for


# Override, the key it sets, and what the stages then have there.
ROUTES = [
    ("data.root=/faces", "data.root", ["/faces", "/faces"]),
    ("seed=7", "model.seed", [7, 7]),
    ("model.scaling_factor=0.5", "model.scaling_factor", [None, 0.5]),
    ("model.unet.dropout=0.1", "model.unet.dropout", [None, 0.1]),
    ("model.loss.perceptual.weights=/vgg.pth", "model.loss.perceptual.weights", ["/vgg.pth", None]),
    ("+model.scheduler.thresholding=true", "model.scheduler.thresholding", [None, True]),
    ("++model.ema.decay=0.5", "model.ema.decay", [None, 0.5]),
    ("+callbacks.mine._target_=a.B", "callbacks.mine._target_", ["a.B", "a.B"]),
    ("~callbacks.throughput", "callbacks.throughput", [None, None]),
    ("trainer=ddp", "trainer.strategy", ["ddp", "ddp"]),
    ("trainer.devices=4", "trainer.devices", [4, 4]),
    ("callbacks=diffusion", "callbacks.sample_grid.steps", [None, 20]),
]


@pytest.fixture(scope="module")
def routed():
    return [plain(config) for config in compose("experiment=celebahq", *(override for override, _, _ in ROUTES))]


def find(tree, key):
    for part in key.split("."):
        tree = (tree or {}).get(part)
    return tree


@pytest.mark.parametrize(("override", "key", "values"), ROUTES, ids=[override for override, _, _ in ROUTES])
def test_an_override_reaches_the_stages_that_know_its_key(routed, override, key, values):
    assert [find(config, key) for config in routed] == values


def test_a_model_is_for_the_stage_that_trains_it():
    models = [config.model for config in compose("experiment=celebahq", "model=ldm_avatars", "model=vq_avatars")]
    assert models[0].loss.perceptual._target_.endswith("MultiScaleL1")
    assert models[1].scheduler.prediction_type == "v_prediction"


def test_groups_can_be_exchanged():
    for config in compose("experiment=celebahq", "logger=csv", "callbacks=none", "trainer=ddp", "trainer.devices=2"):
        assert (list(config.logger), config.callbacks) == (["csv"], {})
        # trainer=ddp inherits the defaults
        assert (config.trainer.strategy, config.trainer.use_distributed_sampler) == ("ddp", False)
    tiny = compose("experiment=celebahq", "debug=tiny", "logger=csv", "callbacks=none")
    assert [len(build_all(config.logger, "logger")) for config in tiny] == [1, 1]
    assert [build_all(config.callbacks, "callbacks") for config in tiny] == [[], []]


# --- mistakes


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["experiment=celeba"], ["experiment=celeba", "celebahq/diffusion"]),
        (["trainer=dpd"], ["trainer=dpd", "cpu, ddp"]),
        (["debug=small"], ["debug=small", "tiny"]),
        (["model.unet.dropuot=0.1"], ["model.unet.dropuot=0.1", "did you mean model.unet.dropout"]),
        (["dropout=0.1"], ["dropout=0.1", "model.unet.dropout"]),
        (["frobnicate=1"], ["frobnicate=1", "no stage has this key"]),
        (["max_images=many"], ["max_images=many", "whole number"]),
        (["max_images=0"], ["max_images=0", "at least 1"]),
        (["checkpoint_every=0"], ["checkpoint_every=0", "at least 1"]),
        (["data.batch_size=2.5"], ["data.batch_size=2.5", "whole number"]),
        (["seed=-1"], ["seed=-1", "at least 0"]),
        (["model.optimizer.lr=fast"], ["model.optimizer.lr=fast", "above 0"]),
        (["name="], ["name", "must be given"]),
        (["seed=1,2"], ["seed=1,2", "--multirun"]),
        (["seed"], ["seed", "not of the form key=value"]),
        (["name=${nothing}"], ["nothing"]),
    ],
)
def test_a_mistake_is_named_in_one_line(overrides, parts):
    message = one_line_error(*overrides)
    for part in parts:
        assert part in message, message


def command(*arguments):
    return subprocess.run(
        [sys.executable, "train.py", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_flags_of_the_command(tmp_path):
    """One process each, without torch where it is not needed."""
    shown = command("--cfg", "job", "experiment=celebahq", "data.root=/faces", f"paths.runs={tmp_path}")
    stages = list(yaml.safe_load_all(shown.stdout))
    assert [(config["stage"], config["data"]["root"]) for config in stages] == [
        ("autoencoder", "/faces"),
        ("diffusion", "/faces"),
    ]
    usage = command("--help")
    assert (usage.returncode, usage.stdout.splitlines()[0].split(":")[0]) == (0, "Train a latent diffusion model")
    for arguments, part in ((["--verbose"], "--verbose: unknown flag"), (["trainer=x", "--cfg"], "trainer=x")):
        refused = command(*arguments)
        assert refused.returncode == 1
        assert refused.stdout == ""
        assert refused.stderr.startswith(f"error: {part}")
        assert refused.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


# --- the files


def uncommented(path):
    """Keys with a value of their own and no comment, on their line or above the first key of their block."""
    found, above = [], False
    skip = None  # the indentation of a block that needs none
    for line in path.read_text(encoding="utf-8").splitlines():
        text, indentation = line.strip(), len(line) - len(line.lstrip())
        if skip is not None and (indentation > skip or text.startswith("- ")):
            continue
        skip = None
        key, _, value = text.partition(":")
        if key in ("defaults", "job_logging"):  # a list of files; Python's own format
            skip = indentation
        elif value and not key.startswith(("_", "#", "- ")) and "#" not in text and not above and "${" not in value:
            found.append(key)
        above = text.startswith("#")
    return found


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.relative_to(CONFIGS).as_posix())
def test_every_key_has_a_comment(path):
    assert uncommented(path) == []

"""What a command line becomes: experiments compose, overrides reach the right stage, mistakes end in one line."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from ldm_lab.config import files
from ldm_lab.config.compose import Recipe, build, build_all, plain
from ldm_lab.config.files import CONFIGS, experiments
from ldm_lab.utils.lengths import parse_images

ROOT = Path(__file__).resolve().parents[2]


def compose(*overrides):
    return Recipe.parse(list(overrides)).compose()


def one_line_error(*overrides):
    with pytest.raises(ValueError) as error:
        compose(*overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- experiments


@pytest.mark.parametrize("tiny", [(), ("debug=tiny",)])
@pytest.mark.parametrize("experiment", experiments())
def test_every_experiment_composes_and_its_parts_can_be_built(experiment, tiny):
    for config in compose(f"experiment={experiment}", *tiny):
        network = config.model[{"autoencoder": "autoencoder", "diffusion": "unet"}[config.stage]]
        # Channels may be left open: they follow from the autoencoder that is given.
        channels = {key: 4 for key in ("in_channels", "out_channels") if network.get(key, 0) is None}
        with torch.device("meta"):
            assert build(network, "network", **channels).num_parameters() > 0
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
    ("+callbacks.mine._target_=torch.nn.GELU", "callbacks.mine._target_", ["torch.nn.GELU", "torch.nn.GELU"]),
    ("~callbacks.throughput", "callbacks.throughput", [None, None]),
    ("trainer=ddp", "trainer.strategy.gradient_as_bucket_view", [True, True]),
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
        assert config.trainer.strategy.gradient_as_bucket_view
        assert not config.trainer.use_distributed_sampler
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
        (["seed=-1"], ["seed=-1", "at least 0"]),
        (["seed=18446744073709551616"], ["seed=18446744073709551616", "at most 9223372036854775807"]),
        (["max_images=null"], ["max_images=null", "whole number"]),
        (["plugins=null"], ["plugins=null", "list of package names"]),
        (["name=null"], ["name=null", "must be given"]),
        (["paths.runs="], ["paths.runs=", "must be given"]),
        (["~seed"], ["~seed", "is needed"]),
        (["logger=null"], ["logger=null", "logger=none"]),
        (["~callbacks"], ["~callbacks", "callbacks=none"]),
        (["data=null"], ["data=null", "avatars, drawn, hub, image_folder"]),
        (["experiment=null"], ["experiment=null", "celebahq"]),
        (["experiment=avatars/diffusion", "model=kl_avatars"], ["model=kl_avatars", "ldm_avatars, ldm_f4"]),
        (["+trainer.accumulate_grad_batches=4"], ["trainer.accumulate_grad_batches=4", "data.batch_size="]),
        (["trainer.limit_train_batches=0.1"], ["trainer.limit_train_batches=0.1", "max_images="]),
        (["model.optimizer.lr=fast"], ["model.optimizer.lr=fast", "above 0"]),
        (["name="], ["name", "must be given"]),
        (["seed=1,2"], ["seed=1,2", "-m (--multirun)"]),
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


# --- lengths


def test_lengths_are_typed_as_people_say_them():
    for config in compose("experiment=celebahq", "max_images=2M", "validate_every=250k", "snapshots=1.5M"):
        assert (config.max_images, config.validate_every, config.preview_every) == (2_000_000, 250_000, 250_000)
        assert config.snapshots == 1_500_000
    assert compose("experiment=avatars/diffusion", "max_images=3M")[0].model.schedule.max_images == 3_000_000


def test_epochs_are_those_of_the_training_images():
    configs = compose("experiment=avatars", "max_images=10ep", "data.module.train_set.num_train=300")
    assert [config.max_images for config in configs] == [3000, 3000]


@pytest.mark.parametrize(
    ("override", "answer"),
    [("trainer.max_epochs=3", "max_images=12288"), ("+trainer.max_steps=100", "max_images=800")],
)
def test_epochs_and_steps_of_the_trainer_are_answered_with_images(override, answer):
    message = one_line_error("experiment=avatars/autoencoder", override)
    assert message.startswith(override.lstrip("+"))
    assert message.endswith(answer)


# --- one's own images


def test_a_folder_of_images_gives_its_name_to_the_run(tmp_path):
    for root, name in (("flowers.v2", "flowers.v2"), ("birds.zip", "birds"), ("a/b/cats", "cats")):
        folder = tmp_path / root
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.touch() if root.endswith("zip") else folder.mkdir()
        assert {config.name for config in compose("experiment=folder", f"data.root={folder}")} == {name}
    assert compose("experiment=folder", "data.root=x", "name=mine")[0].name == "mine"


def test_a_model_that_is_chosen_for_ones_own_images_works_there():
    for path in sorted(CONFIGS.glob("model/*.yaml")):
        kind = "diffusion" if path.stem.startswith("ldm") else "autoencoder"
        (config,) = compose(f"experiment=folder/{kind}", "data.root=x", f"model={path.stem}")
        small = yaml.safe_load((CONFIGS / f"length/{kind}.yaml").read_text())
        assert (config.max_images, config.data.module.global_batch_size) == (
            small["max_images"],
            small["data"]["global_batch_size"],
        )
        network = config.model.unet if kind == "diffusion" else config.model.autoencoder
        channels = {key: 4 for key in ("in_channels", "out_channels") if network.get(key, 0) is None}
        with torch.device("meta"):
            assert build(network, "network", **channels).num_parameters() > 0


@pytest.mark.parametrize("size", ["small", "base", "paper"])
def test_a_size_brings_networks_batch_and_length_for_both_stages(size):
    stages = compose("experiment=folder", "data.root=x", f"model={size}")
    for config, option in zip(stages, ("autoencoder", "diffusion"), strict=True):
        where = f"length/{option}.yaml" if size == "small" else f"model/{size}/{option}.yaml"
        file = yaml.safe_load((CONFIGS / where).read_text())
        assert config.data.module.global_batch_size == file["data"]["global_batch_size"]
        assert config.max_images == parse_images(file["max_images"], "")
        assert f".{option}_module." in config.model._target_
    assert stages[1].model.scaling_factor == "measure"
    assert stages[1].model.unet.in_channels is None
    assert compose("experiment=folder", "data.root=x", f"model={size}", "max_images=7")[0].max_images == 7


# --- plugins


def test_only_the_command_line_and_local_settings_may_name_plugins(tmp_path, monkeypatch):
    root = tmp_path / "configs"
    shutil.copytree(CONFIGS, root)
    monkeypatch.setattr(files, "CONFIGS", root)
    assert compose("plugins=[tests]")[0].plugins == ["tests"]
    (root / "local/default.yaml").write_text("# @package _global_\nplugins: [tests]\n")
    assert compose()[0].plugins == ["tests"]
    (root / "local/default.yaml").unlink()
    stage = root / "experiment/avatars/autoencoder.yaml"
    stage.write_text(stage.read_text() + "plugins: [tests]\n")
    assert "plugins=['tests'] stands in a config file" in one_line_error("experiment=avatars")
    assert compose("plugins=[tests]")[0].plugins == ["tests"]


@pytest.mark.parametrize("text", ["name: [1, 2", "\tname: x", "a: b: c", "- a\n- b", b"name: \xff"], ids=str)
def test_a_file_that_is_no_yaml_is_one_line(tmp_path, monkeypatch, text):
    root = tmp_path / "configs"
    shutil.copytree(CONFIGS, root)
    monkeypatch.setattr(files, "CONFIGS", root)
    for file in ("experiment/mine.yaml", "local/default.yaml"):
        (root / file).write_bytes(text if isinstance(text, bytes) else text.encode())
        assert file.partition("/")[0] in one_line_error("experiment=mine" if "mine" in file else "experiment=celebahq")
        (root / file).unlink()


def test_a_class_of_a_package_that_is_no_plugin_is_refused_with_what_to_add():
    override = "+callbacks.mine._target_=tests.callbacks.Journal"
    assert one_line_error(override).endswith("add plugins=[tests]")
    assert compose(override, "plugins=[tests]")

"""What a config may hold."""

import inspect

import lightning
import pytest

from ldm_lab.config.checks import ELSEWHERE, check, check_trainer
from ldm_lab.utils.nested import find


def with_target(target, **more):
    return {"model": {"parts": [{"_target_": target}]}, **more}


@pytest.mark.parametrize(
    "target",
    [
        "ldm_lab.models.vq_model.VQModel",
        "ldm_lab.data.drawn.drawn_or_folder",
        "torch.optim.AdamW",
        "torch.optim.lr_scheduler.LambdaLR",
        "torch.nn.MSELoss",
        "lightning.Trainer",
        "lightning.pytorch.callbacks.DeviceStatsMonitor",
    ],
)
def test_what_a_training_is_made_of_may_be_named(target):
    check(with_target(target))


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "builtins.eval",
        "torch.load",
        "torch.hub.load",
        "ldm_lab.utils.images.os.system",
        "ldm_lab.config.compose.hydra.utils.call",
        "lightning.pytorch.trainer.trainer.os.system",
        "tests.callbacks.Journal",
        "eval",
        "",
    ],
)
def test_what_could_do_anything_is_refused_with_its_key(target):
    with pytest.raises(ValueError, match=r"^model\.parts\.0\._target_=") as error:
        check(with_target(target))
    assert "\n" not in str(error.value)


def test_a_plugin_adds_its_own_classes_and_no_others():
    check(with_target("tests.callbacks.Journal", plugins=["tests"]))
    with pytest.raises(ValueError, match=r"add plugins=\[other\]"):
        check(with_target("other.callbacks.Journal", plugins=["tests"]))


@pytest.mark.parametrize("plugins", ["tests", [3], ["a.b"], ["../tests"], {"tests": 1}])
def test_plugins_are_a_list_of_packages(plugins):
    with pytest.raises(ValueError, match=r"^plugins=.* must be a list of package names"):
        check({"plugins": plugins})


def test_an_absent_plugin_is_named():
    with pytest.raises(ValueError, match=r"^plugins=\[no_such_package\]: there is no such package"):
        check({"plugins": ["no_such_package"]})


def test_find_looks_nothing_up_where_nothing_is():
    assert find({"a": {"b": 1}}, "a.b") == 1
    assert find({"a": {"b": 1}}, "a.c.d") is None
    assert find({"a": 3}, "a.b") is None


@pytest.mark.parametrize(
    ("key", "value", "instead"),
    [
        ("accumulate_grad_batches", 4, "data.batch_size="),
        ("limit_train_batches", 0, "max_images="),
        ("fast_dev_run", True, "debug=tiny"),
        ("overfit_batches", 0.1, "max_images="),
        ("max_steps", "10", "max_images="),
        ("val_check_interval", 0.5, "validate_every="),
        ("enable_checkpointing", True, "checkpoint_every="),
        ("default_root_dir", "/x", "paths.runs="),
        ("callbacks", [], "callbacks="),
    ],
)
def test_what_lightning_would_do_otherwise_is_answered_with_our_key(key, value, instead):
    with pytest.raises(ValueError, match=rf"^trainer\.{key}=.*: does nothing here; .*{instead}") as error:
        check_trainer({"stage": "autoencoder", "trainer": {key: value}})
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"does nothing here; num_samples= "):
        check_trainer({"trainer": {key: value}})


def test_what_the_trainer_does_is_left_to_it():
    """Its arguments by their names: one that Lightning drops or renames is found here."""
    arguments = inspect.signature(lightning.Trainer.__init__).parameters
    assert set(ELSEWHERE) <= set(arguments)
    check_trainer({"stage": "", "trainer": {"max_time": "00:01:00:00", "limit_val_batches": 0, "max_epochs": -1}})
    check_trainer({"stage": "", "trainer": dict.fromkeys(arguments)})

"""Checks a resolved config, as plain data; each error is one line that names the key."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

from ldm_lab.runs.settings import SETTINGS
from ldm_lab.training.precisions import ALIASES, PRECISIONS, SAMPLING_PRECISIONS
from ldm_lab.utils import signatures
from ldm_lab.utils.errors import UserError
from ldm_lab.utils.moved import current
from ldm_lab.utils.nested import find, flatten, shown, targets
from ldm_lab.utils.shell import is_text

# Arguments of `lightning.Trainer` that have no effect here, or do harm -> advice.
_LENGTH = "the length of a stage is max_images=; debug=tiny tries everything in seconds"
_ACCUMULATION = "gradients are accumulated until data.global_batch_size= is complete; a device holds data.batch_size="
ELSEWHERE = {
    "accumulate_grad_batches": _ACCUMULATION,
    **dict.fromkeys(("fast_dev_run", "limit_train_batches", "overfit_batches"), _LENGTH),
    **dict.fromkeys(("max_epochs", "min_epochs", "max_steps"), _LENGTH),
    **dict.fromkeys(("val_check_interval", "check_val_every_n_epoch"), "validate_every= counts images"),
    **dict.fromkeys(("limit_test_batches", "limit_predict_batches"), "training neither tests nor predicts"),
    "reload_dataloaders_every_n_epochs": "the stream of training images has no epochs",
    "use_distributed_sampler": "the sampler already shares the stream among the devices",
    "enable_checkpointing": "checkpoint_every= and snapshots= say when to save",
    "default_root_dir": "everything is written below paths.runs=",
    "logger": "the group logger= says what is logged where",
    "callbacks": "the group callbacks= takes them, +callbacks.mine._target_=...",
    "plugins": "precision and devices have keys of their own, trainer.precision= and trainer.strategy=",
}

PACKAGE = Path(__file__).resolve().parents[1]
# Allowed in `_target_` beside this package and plugins: public classes that training needs and that read no files.
PUBLIC = re.compile(r"(torch\.(nn|optim|optim\.lr_scheduler)|lightning|lightning\.pytorch(\.[a-z_]+)*)\.[A-Z]\w*")


def check(config: dict[str, Any]) -> None:
    """Reject missing values, numbers out of range and classes of other packages. Raises `UserError`."""
    for key, hint in SETTINGS.items():
        if (value := find(config, key, ...)) is not ...:
            signatures.require(key, value, hint)
    _check_texts(config)
    check_precision(config)
    check_trainer(config)
    cached = find(config, "stage") == "diffusion" and find(config, "data.latents") == "cached"
    if cached and find(config, "data.module.train_set.random_crop"):
        raise UserError("data.random_crop=true: the latent cache holds one crop of each image; add data.latents=online")
    check_code(config)


def _check_texts(config: dict[str, Any]) -> None:
    for key, value in flatten(config).items():
        if value == "" and is_text(key):
            raise UserError(f"{key}= must be given a value, or be left out")
        if isinstance(value, (bool, int, float)) and is_text(key):
            raise UserError(f"{key}={shown(value)}: is no text; in a YAML file, put it in quotes")


def check_precision(config: dict[str, Any]) -> None:
    """Reject a precision that training or sampling does not support. Raises `UserError`."""
    known = PRECISIONS if "stage" in config else (*PRECISIONS, *SAMPLING_PRECISIONS)
    value = find(config, "trainer.precision")
    if value is not None and str(value) not in (*known, *ALIASES):
        why = "training keeps its weights in float32: " if value in SAMPLING_PRECISIONS else ""
        raise UserError(f"trainer.precision={value}: {why}give {', '.join(known[:-1])} or {known[-1]}")


def check_trainer(config: dict[str, Any]) -> None:
    """Reject arguments of Lightning's trainer that have no effect here. Raises `UserError` with advice."""
    for key, value in (config.get("trainer") or {}).items():
        if key in ELSEWHERE and value not in (None, -1) and value is not False:
            instead = ELSEWHERE[key] if "stage" in config else "num_samples= says how many to draw"
            raise UserError(f"trainer.{key}={shown(value)}: does nothing here; {instead}")


def check_code(config: dict[str, Any]) -> None:
    """Reject classes of other packages. Raises `UserError`."""
    plugins = config.get("plugins", [])
    check_plugins(plugins)
    for key, target in targets(config):
        check_target(key, target, plugins)


def check_plugins(plugins: Any) -> None:  # noqa: ANN401
    """Reject anything but a list of installed packages. Raises `UserError`."""
    if not isinstance(plugins, list) or not all(isinstance(name, str) and name.isidentifier() for name in plugins):
        raise UserError(f"plugins={shown(plugins)}: must be a list of package names, such as plugins=[my_pkg]")
    for name in plugins:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"plugins=[{name}]: there is no such package; install it, or put {name}/ beside train.py")


def check_target(key: str, target: str, plugins: list[str]) -> None:
    """Raise `UserError` unless a `_target_` belongs to this package or a plugin, or matches `PUBLIC`."""
    module = current(target).rpartition(".")[0]
    package = module.split(".")[0]
    if package == PACKAGE.name:
        # Only files count as modules, not their imports: ldm_lab.utils.images.os.system could run any command.
        if not PACKAGE.parent.joinpath(*module.split(".")).with_suffix(".py").is_file():
            raise UserError(f"{key}={target}: {module} is no module of {PACKAGE.name}")
    elif package not in plugins and not PUBLIC.fullmatch(target):
        advice = f"if you trust it, add plugins=[{package}]" if package else "give package.module.Class"
        raise UserError(f"{key}={target}: a config may name classes of {PACKAGE.name}; {advice}")

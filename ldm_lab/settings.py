"""What a resolved config may hold: pure checks of plain data, each refusal one line that names the key."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ldm_lab.errors import UserError

# Whole numbers, and the lowest that each may be.
LOWEST = {
    "max_images": 1, "validate_every": 1, "checkpoint_every": 1, "preview_every": 1, "snapshots": 1, "seed": 0,
    "data.global_batch_size": 1, "data.batch_size": 1, "data.val_batch_size": 1, "data.num_workers": 0,
    "data.max_pixels": 1, "num_samples": 0, "batch_size": 1, "sampler.steps": 1, "denoising": 0, "max_pixels": 1,
    "trainer.num_nodes": 1,
}  # fmt: skip
WORDS = {"data.batch_size": ("auto",)}  # instead of a number
SWITCHES = ("compile", "plan", "tiling", "slicing")
CHOICES = {
    "data.latents": ("cached", "online"),
    "data.latents_dtype": ("float16", "bfloat16", "float32"),
    "data.latents_precision": ("float32", "bfloat16"),
}
PRECISIONS = ("auto", "32-true", "bf16-mixed", "16-mixed")  # of `trainer.precision`
SAMPLING_PRECISIONS = ("bf16-true", "16-true")  # beside them: networks whose weights are rounded
ALIASES = {"32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}  # Lightning's

# What may differ between two starts of one run, because it changes neither data, model nor objective: whole groups,
# and of the data where it lies and how it is read. The length of a schedule follows `max_images`; the first stage has
# its own check.
HARMLESS_GROUPS = (
    "trainer", "callbacks", "logger", "paths", "resume", "compile", "max_images", "validate_every",
    "checkpoint_every", "preview_every", "snapshots", "autoencoder", "autoencoder_hash", "plan", "plugins",
    "optimized_metric", "model.schedule.max_images", "model.gradient_checkpointing", "model.optimizer.fused",
)  # fmt: skip
HARMLESS_IN_DATA = (
    "root", "cache_dir", "num_workers", "batch_size", "val_batch_size", "on_error", "max_pixels", "latents",
    "latents_dtype", "latents_precision",
)  # fmt: skip

PACKAGE = Path(__file__).resolve().parent
# What `_target_` may name beside this package and plugins: public classes that make a training and read no files.
PUBLIC = re.compile(r"(torch\.(nn|optim|optim\.lr_scheduler)|lightning|lightning\.pytorch(\.[a-z_]+)*)\.[A-Z]\w*")


def check(config: dict[str, Any]) -> None:
    """Refuse numbers out of range and classes from elsewhere. Raises `UserError`."""
    for key, low in LOWEST.items():
        value = find(config, key)
        if value is None or value in WORDS.get(key, ()):
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            words = "".join(f" or {word}" for word in WORDS.get(key, ()))
            raise UserError(f"{key}={value}: must be a whole number, at least {low}{words}")
    check_choices(config)
    for key in SWITCHES:
        if not isinstance(value := config.get(key, False), bool):
            raise UserError(f"{key}={value}: must be true or false")
    cached = find(config, "stage") == "diffusion" and find(config, "data.latents") == "cached"
    if cached and find(config, "data.module.train_set.random_crop"):
        raise UserError("data.random_crop=true: latents are cached of one crop of each image; add data.latents=online")
    rate = find(config, "model.optimizer.lr")
    if rate is not None and (not isinstance(rate, (int, float)) or rate <= 0):
        raise UserError(f"model.optimizer.lr={rate}: must be a number above 0")
    check_code(config)


def check_choices(config: dict[str, Any]) -> None:
    """Refuse words that a setting does not know. Raises `UserError`."""
    for key, choices in CHOICES.items():
        if (value := find(config, key)) is not None and value not in choices:
            raise UserError(f"{key}={value}: give {one_of(choices)}")
    known = PRECISIONS if "stage" in config else (*PRECISIONS, *SAMPLING_PRECISIONS)
    value = find(config, "trainer.precision")
    if value is not None and str(value) not in (*known, *ALIASES):
        why = "training keeps its weights in float32: " if value in SAMPLING_PRECISIONS else ""
        raise UserError(f"trainer.precision={value}: {why}give {one_of(known)}")


def one_of(choices: Sequence[str]) -> str:
    """`a, b or c`."""
    return f"{', '.join(choices[:-1])} or {choices[-1]}"


def check_code(config: dict[str, Any]) -> None:
    """Refuse classes from elsewhere. Raises `UserError`."""
    plugins = config.get("plugins") or []
    check_plugins(plugins)
    for key, target in targets(config):
        check_target(key, target, plugins)


def check_plugins(plugins: Any) -> None:  # noqa: ANN401
    """Refuse what is not a list of packages that are there. Raises `UserError`."""
    if not isinstance(plugins, list) or not all(isinstance(name, str) and name.isidentifier() for name in plugins):
        raise UserError(f"plugins={plugins}: must be a list of package names, such as plugins=[my_pkg]")
    for name in plugins:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"plugins=[{name}]: there is no such package; install it, or put {name}/ beside train.py")


def check_target(key: str, target: str, plugins: list[str]) -> None:
    """Refuse a `_target_` that is neither of this package, nor of a plugin, nor public (see `PUBLIC`)."""
    module = target.rpartition(".")[0]
    package = module.split(".")[0]
    if package == PACKAGE.name:
        # A module, not what one has imported: ldm_lab.images.os.system would be a way to run anything.
        if not PACKAGE.parent.joinpath(*module.split(".")).with_suffix(".py").is_file():
            raise UserError(f"{key}={target}: {module} is no module of {PACKAGE.name}")
    elif package not in plugins and not PUBLIC.fullmatch(target):
        advice = f"if you trust it, add plugins=[{package}]" if package else "give package.module.Class"
        raise UserError(f"{key}={target}: a config may name classes of {PACKAGE.name}; {advice}")


def targets(tree: Any, prefix: str = "") -> Iterator[tuple[str, str]]:  # noqa: ANN401
    """Every `_target_` of nested data with its key."""
    if isinstance(tree, dict):
        for key, child in tree.items():
            if key == "_target_":
                yield f"{prefix}{key}", str(child)
            else:
                yield from targets(child, f"{prefix}{key}.")
    elif isinstance(tree, list):
        for place, child in enumerate(tree):
            yield from targets(child, f"{prefix}{place}.")


def find(tree: dict[str, Any], key: str) -> Any:  # noqa: ANN401
    """The value at a dotted key, `None` where there is none."""
    node: Any = tree
    for part in key.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return node


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:  # noqa: ANN401
    """A nested dict as `{"a.b": value}`."""
    if not isinstance(tree, dict) or not tree:
        return {prefix[:-1]: tree}
    return {key: value for name, child in tree.items() for key, value in flatten(child, f"{prefix}{name}.").items()}


def is_harmless(key: str) -> bool:
    """Whether a changed setting leaves a run what it is: neither data, model nor objective are others."""
    if key == "trainer.gradient_clip_val":
        return False
    if key.startswith("data."):
        return key.rsplit(".", 1)[-1] in HARMLESS_IN_DATA
    return any(key == group or key.startswith(f"{group}.") for group in HARMLESS_GROUPS)

"""Modules that have moved: their old names work in every `_target_` and every import."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

HOME = "ldm_lab."
UTILS = (
    "compiled", "configurable", "errors", "float32", "hub", "images", "lengths", "locks", "outputs",
    "randomness", "terminal", "threads", "transfer", "version", "weights",
)  # fmt: skip
PLANNING = ("batch_size", "estimate", "memory", "plan", "preflight", "preview", "trial")

# Old place -> new one, for each module itself and those below it.
MOVED = {
    **{name: f"utils.{name}" for name in UTILS},
    "signatures": "utils.signatures", "typed": "utils.shell", "untrusted": "utils.reading", "saving": "utils.writing",
    "memory": "utils.memory_switches", "notices": "utils.terminal",
    "diffusion.checks": "utils.arguments", "models.arguments": "utils.arguments",
    "building": "config.build", "config_files": "config.files", "config_keys": "config.keys", "kinds": "config.kinds",
    "overrides": "config.overrides", "settings": "config.checks", "stages": "config.stages", "sweep": "config.sweep",
    "checkpoint": "checkpoints.checkpoint", "parts": "checkpoints.parts", "states": "checkpoints.locate",
    "state_dicts": "checkpoints.state_dicts", "interop": "checkpoints",
    "diffusion.thresholding": "diffusion.broadcast",
    "data.files": "data.storage.files", "data.archives": "data.storage.archives",
    "data.decode": "data.decoding.pictures", "data.metadata": "data.decoding.metadata",
    "models.encoder": "models.encoder_decoder", "models.decoder": "models.encoder_decoder",
    "models.gaussian": "models.outputs", "training.slurm": "training.launcher",
    "training.callbacks.same_start": "training.callbacks.ranks",
    "training.callbacks.smallest_batch_size": "training.callbacks.ranks",
    "nn": "models.layers", "serialization": "models.pretrained", "denoising": "diffusion.denoising",
    "card": "runs.card", "diagnosis": "runs.diagnosis", "records": "runs.record", "tracking": "runs.tracking",
    "training.changes": "runs.changes", "training.run_folder": "runs.folder", "pictures": "sampling.pictures",
    **{f"training.{name}": f"training.planning.{name}" for name in PLANNING},
    "benchmark.peer": "tools.benchmark.subjects", "dashboard.runs": "tools.dashboard.command",
    "benchmark": "tools.benchmark", "commands": "tools", "dashboard": "tools.dashboard",
    "evaluation": "tools.evaluate", "report": "tools.report",
}  # fmt: skip


def current(name: str) -> str:
    """Today's dotted name of a module, class or function of this package; other names as they are."""
    if not name.startswith(HOME):
        return name
    parts = name.removeprefix(HOME).split(".")
    for count in (3, 2, 1):
        if new := MOVED.get(".".join(parts[:count])):
            return HOME + ".".join([new, *parts[count:]])
    return name


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports a module by its old name: the module itself, not a second one."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """A spec for old names alone."""
        return None if current(name) == name else importlib.util.spec_from_loader(name, self)

    def exec_module(self, module: ModuleType) -> None:
        """Put the module of today in the place of `module`."""
        sys.modules[module.__name__] = importlib.import_module(current(module.__name__))


def install() -> None:
    """Let old names be imported. The finder comes first: others would load a moved module a second time."""
    if not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, Finder())

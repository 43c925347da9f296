"""What a training checkpoint holds, and how one is written and read.

A checkpoint is what Lightning saves (`state_dict`, `optimizer_states`, `loops`, ...) and an entry
`ldm_lab` that makes the file explain itself:

    stage        "autoencoder" or "diffusion"
    images_seen  training images so far
    version      of this package
    configs      name -> config of each network (which names its class) and of the scheduler, plain data
    prefixes     name -> where its tensors lie in `state_dict` (for the UNet: its moving average)

Everything is dicts, lists, strings, numbers and tensors, so `torch.load(weights_only=True)` reads it.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldm_lab.models.first_stage import FirstStage
from ldm_lab.models.kl_model import AutoencoderKL
from ldm_lab.models.vq_model import VQModel
from ldm_lab.serialization import Configurable, LoadError, PretrainedModel, read_json, read_torch, replacing

ENTRY = "ldm_lab"
STATUS = "status.json"
LIBRARIES = ("diffusers", "ldm_lab")  # a class of one is ours of the same name; neither is ever a plugin
FIRST_STAGES = {"VQModel": VQModel, "AutoencoderKL": AutoencoderKL}


def save(state: dict[str, Any], path: str | Path) -> None:
    """Write `state`: under a temporary name, flushed to disk, then renamed over the previous one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        torch.save(state, temporary)


def load(path: str | Path, mmap: bool = False) -> dict[str, Any]:
    """Read a training checkpoint, on the CPU, without running anything it holds.

    Raises:
        LoadError: no such file, not a checkpoint of this package, or damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise LoadError(f"{path}: no such file")
    state = read_torch(path, mmap)
    if not isinstance(state, dict) or not isinstance(state.get(ENTRY), dict) or "state_dict" not in state:
        raise LoadError(f"{path}: not a training checkpoint of ldm_lab")
    return state


def describe(path: str | Path) -> dict[str, Any]:
    """The entry `ldm_lab` of a checkpoint; the tensors stay on disk."""
    return load(path, mmap=True)[ENTRY]


def networks(
    path: str | Path, known: Mapping[str, Sequence[type[PretrainedModel]]], plugins: Sequence[str] = ()
) -> dict[str, PretrainedModel]:
    """Rebuild networks from a checkpoint, in evaluation mode.

    Args:
        path: the file.
        known: name -> classes of this package, for those wanted; the first where the file names none.
        plugins: packages whose classes the file may name too.

    Raises:
        LoadError: the checkpoint does not hold one of them, or not all of its tensors.
    """
    state = load(path)
    entry = state[ENTRY]
    built = {}
    for name, kinds in known.items():
        if name not in entry["prefixes"]:
            raise LoadError(f"{path}: a checkpoint of stage {entry['stage']!r} holds no {name}")
        prefix, config = entry["prefixes"][name], entry["configs"][name]
        tensors = {key[len(prefix) :]: value for key, value in state["state_dict"].items() if key.startswith(prefix)}
        kind = class_of(config, kinds, plugins, f"{path}: {name}")
        with torch.device("meta"):
            model = kind.from_config(config)
        model.load_weights(tensors, origin=str(path), assign=True)
        built[name] = model.eval()
    return built


def class_of(config: dict[str, Any], kinds: Sequence[type], plugins: Sequence[str], origin: str) -> type[Configurable]:
    """The class that a config names: one of `kinds`, the first where it names none, or one of a plugin."""
    known = {kind.__name__: kind for kind in kinds}
    return class_named(str(config.get("_class_name", next(iter(known)))), known, plugins, origin)


def class_named(name: str, known: Mapping[str, type], plugins: Sequence[str], origin: str) -> type[Configurable]:
    """The class that a file names. Nothing is imported but what lies in a package of `plugins`.

    Args:
        name: one of `known`, or the module and the class of a plugin: `my_package.networks.MyUNet`.
        known: classes of this package by name.
        plugins: packages that the user trusts.
        origin: the file and what it names there, for the message.

    Raises:
        LoadError: the name is not known, its package is not in `plugins`, or holds no such class.
    """
    if name in known:
        return known[name]
    module, _, kind = name.rpartition(".")
    package = module.split(".")[0]
    if package in ("", *LIBRARIES):
        raise LoadError(f"{origin} is {name}; known are {', '.join(known)}")
    if package not in plugins:
        raise LoadError(f"{origin} is {name}: add plugins=[{package}]")
    try:
        found = getattr(importlib.import_module(module), kind, None)
    except ImportError as error:
        raise LoadError(f"{origin} is {name}, which cannot be imported: {error}") from error
    if not isinstance(found, type) or not issubclass(found, Configurable):
        raise LoadError(f"{origin} is {name}: {module} has no such subclass of PretrainedModel or Scheduler")
    return found


def load_autoencoder(source: str | Path, plugins: Sequence[str] = ()) -> FirstStage:
    """A first stage of any kind from a model folder, a pipeline folder, a run folder or a training checkpoint.

    Args:
        source: the folder or file; in a pipeline folder, the first stage lies in `vqvae` or in `vae`.
        plugins: packages whose classes it may name too.

    Raises:
        LoadError: none is there, or it is damaged; the message says how one is made.
    """
    source, kinds = Path(source), tuple(FIRST_STAGES.values())
    if source.is_file():
        return networks(source, {"vqvae": kinds}, plugins)["vqvae"]
    for folder in (source, source / "vqvae", source / "vae", source / "autoencoder/final", source / "final"):
        path = folder / FirstStage.config_name
        if path.is_file():
            return class_of(read_json(path), kinds, plugins, f"{path}: the first stage").from_pretrained(folder)
    raise LoadError(f"{source}: there is no first stage here (a folder with {FirstStage.config_name})")


def fingerprint(network: nn.Module) -> str:
    """A hash of a network's tensors, names and values, whatever file they came from."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(value.detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()[:16]

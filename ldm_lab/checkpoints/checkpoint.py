"""Reads and writes training checkpoints.

A checkpoint holds Lightning's entries (`state_dict`, `optimizer_states`, `loops`, ...) and the entry
`ldm_lab`, which makes the file self-describing:

    stage        "autoencoder" or "diffusion"
    images_seen  training images so far
    version      version of this package
        ldm_lab_format  format of the file, see `ldm_lab.utils.version`
        configs      name -> config of each network (which names its class) and of the scheduler, plain data
        prefixes     name -> prefix of its tensors in `state_dict` (for the UNet: its moving average)

Everything is dicts, lists, strings, numbers and tensors, so `torch.load(weights_only=True)` reads it.

Functions that read a model also accept a checkpoint of CompVis/latent-diffusion.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm_lab.checkpoints import compvis
from ldm_lab.checkpoints.compvis import Part
from ldm_lab.checkpoints.state_dicts import tensors_in, unwrapped
from ldm_lab.utils import shell
from ldm_lab.utils.configurable import Configurable
from ldm_lab.utils.hub import CONFIG
from ldm_lab.utils.reading import ZIP, LoadError, check_plain, first_bytes, is_safetensors, read_torch, reason
from ldm_lab.utils.weights import LEGACY_WEIGHTS, WEIGHTS, are_named_tensors
from ldm_lab.utils.writing import replacing

ENTRY = "ldm_lab"
ENTRIES = {"stage": str, "images_seen": int, "configs": dict, "prefixes": dict}
LAST, PREVIOUS = "last.ckpt", "previous.ckpt"  # newest and previous checkpoint in `checkpoints/` of a stage
STATUS = "status.json"
YOUNG = 2 * 10**9  # nanoseconds
LIBRARIES = ("diffusers", "ldm_lab")  # their classes mean this package's class of the same name; never plugins


def save(state: dict[str, Any], path: str | Path) -> None:
    """Write `state` under a temporary name, flush it to disk, then rename it over the previous file.

    Raises:
        SaveError: the file cannot be written.
    """
    with replacing(path) as temporary, open(temporary, "wb") as file:
        torch.save(state, file)  # not a path, as torch's own writer loses the disk's error


def load(path: str | Path, mmap: bool = False) -> dict[str, Any]:
    """Read a training checkpoint on the CPU, without executing code from the file.

    Args:
        path: the file.
        mmap: leave the tensors on disk until they are used; their checksums are not verified then.

    Raises:
        LoadError: the file is missing, corrupt, or not a checkpoint of this package.
    """
    path = shell.path(path)
    if not path.is_file():
        raise LoadError(f"{path}: no such file")
    start = first_bytes(path)
    if not mmap and (ZIP.startswith(start) or start.startswith(ZIP)):  # other formats have no checksums
        verify(path)
    state = read_torch(path, mmap)
    entry = state.get(ENTRY) if isinstance(state, dict) and are_named_tensors(state.get("state_dict")) else None
    if not isinstance(entry, dict) or not ENTRIES.keys() <= entry.keys():
        raise LoadError(f"{path}: not a training checkpoint of ldm_lab{_but(state, path)}")
    _check_entry(entry, path)
    return state


def _but(content: Any, path: Path) -> str:  # noqa: ANN401
    """The end of a message: the content of the file instead, and advice."""
    tensors = tensors_in(content)
    if tensors is None:
        return ""
    if (path.parent / CONFIG).is_file():
        return f", but the weights of one network: name their folder, or that of the whole pipeline ({path.parent})"
    name = WEIGHTS if is_safetensors(path) else LEGACY_WEIGHTS
    return (
        f", but a state dict ({len(tensors):,} tensors, such as {next(iter(tensors))!r}), and no config of its network:"
        f" put it as {name} beside that {CONFIG}, and name the folder; of CompVis, give the whole checkpoint, with"
        " tensors model.diffusion_model.* and first_stage_model.*, and its original_config="
    )


def _check_entry(entry: dict[str, Any], path: Path) -> None:
    """Raise `LoadError` if the `ldm_lab` entry has other types than this module writes."""
    check_plain(entry, f"{path}: {ENTRY}")
    for key, kind in ENTRIES.items():
        if not isinstance(entry[key], kind):
            raise LoadError(f"{path}: {ENTRY}.{key} is a {type(entry[key]).__name__}, not a {kind.__name__}")
    for key, kind in (("configs", dict), ("prefixes", str)):
        for name, value in entry[key].items():
            if not isinstance(name, str) or not isinstance(value, kind):
                raise LoadError(f"{path}: {ENTRY}.{key}.{name} is a {type(value).__name__}, not a {kind.__name__}")


class DamagedError(LoadError):
    """A file is corrupt."""


def verify(path: Path) -> None:
    """Verify the CRC-32 checksums of a file of `torch.save`, which `torch.load` ignores; once, until the file changes.

    A resume asks for the newest whole state, compares configs, validates and trains: each asks for the file anew.

    Raises:
        DamagedError: a checksum does not match, or the file cannot be read.
    """
    try:
        stat, now = path.stat(), time.time_ns()
        settled = now - stat.st_mtime_ns > YOUNG  # clocks of file systems tick slowly: a change may not show at once
        version = (stat.st_dev, stat.st_ino, stat.st_mtime_ns if settled else now)
        damage = _damage(path.absolute(), stat.st_size, version)
    except Exception as error:  # zipfile raises almost anything on corrupt files
        raise DamagedError(f"{path}: damaged ({reason(path, error)})") from error
    if damage:
        raise DamagedError(f"{path}: damaged ({damage})")


@functools.lru_cache(maxsize=4)
def _damage(path: Path, size: int, version: object) -> str | None:
    if size == 0:
        return "empty"
    with zipfile.ZipFile(path) as file:
        if sum(part.file_size for part in file.infolist()) > size:  # torch does not compress
            return "its parts are larger than the whole"
        part = file.testzip()
    return f"CRC mismatch in {part}: the file is corrupt" if part else None


def newest(folder: Path, report: Callable[[str], Any]) -> Path | None:
    """The newest intact checkpoint in `checkpoints/` of a stage; `None` without any checkpoint.

    Args:
        folder: `checkpoints/`.
        report: called with one line on the corrupt files, if an older checkpoint replaces them.

    Raises:
        LoadError: all checkpoints are corrupt.
    """
    damages = []
    for path in (folder / name for name in (LAST, PREVIOUS)):
        try:
            if path.is_file():
                verify(path)
                if damages:
                    report(f"{'; '.join(damages)}: {path.name} takes its place")
                return path
        except DamagedError as error:
            damages.append(str(error))
    if damages:
        raise LoadError(f"{'; '.join(damages)}: no whole checkpoint is left; put one there, or choose another name=")
    return None


def describe(path: str | Path) -> dict[str, Any]:
    """Read the entry `ldm_lab` of a checkpoint; the tensors stay on disk."""
    return load(path, mmap=True)[ENTRY]


def images_seen(path: str | Path) -> int | None:
    """Training images up to a checkpoint; `None` for a CompVis checkpoint, which does not store them."""
    return None if compvis.is_checkpoint(path) else describe(path)["images_seen"]


def configs(path: str | Path) -> dict[str, dict[str, Any]]:
    """The configs in a checkpoint of this package or of CompVis: `vqvae`, `unet`, `scheduler`."""
    if compvis.is_checkpoint(path):
        return {name: part.config for name, part in compvis.read(path).items()}
    return describe(path)["configs"]


def parts(path: str | Path) -> dict[str, Part]:
    """Configs and tensors in a checkpoint of this package or of CompVis; a UNet's weights are the averaged ones."""
    if compvis.is_checkpoint(path):
        return compvis.read(path)
    state = load(path)
    entry = state[ENTRY]
    return {
        name: Part(config, _below(state["state_dict"], entry["prefixes"].get(name)))
        for name, config in entry["configs"].items()
    }


def _below(state: dict[str, Tensor], prefix: str | None) -> dict[str, Tensor]:
    """The tensors with a prefix, under names without it; none for a part without tensors (a scheduler)."""
    if prefix is None:
        return {}
    named = unwrapped(state, [key for key in state if key.startswith(prefix)])
    return {key[len(prefix) :]: value for key, value in named.items() if key.startswith(prefix)}


def network(parts: Mapping[str, Part], name: str, kinds: Sequence[type], plugins: Sequence[str], origin: str) -> Any:  # noqa: ANN401
    """Build one network of a checkpoint's `parts`, in evaluation mode.

    Args:
        parts: the result of `parts`.
        name: name of the network.
        kinds: allowed classes of this package; the first is the default if the config names no class.
        plugins: packages whose classes the config may name too.
        origin: the file, for the message.

    Raises:
        LoadError: the checkpoint lacks the network, or some of its tensors.
    """
    if name not in parts:
        raise LoadError(f"{origin}: this checkpoint holds no {name}, only {', '.join(parts)}")
    config, tensors = parts[name]
    return class_of(config, kinds, plugins, f"{origin}: {name}").from_tensors(config, tensors, origin)


def class_of(config: dict[str, Any], kinds: Sequence[type], plugins: Sequence[str], origin: str) -> type[Configurable]:
    """The class that a config names: one of `kinds` (the first by default), or a class of a plugin."""
    known = {kind.__name__: kind for kind in kinds}
    return class_named(str(config.get("_class_name", next(iter(known)))), known, plugins, origin)


def class_named(name: str, known: Mapping[str, type], plugins: Sequence[str], origin: str) -> type[Configurable]:
    """The class that a file names. Imports only from packages in `plugins`.

    Args:
        name: one of `known`, or the module and the class of a plugin: `my_package.networks.MyUNet`.
        known: classes of this package by name.
        plugins: packages that the user trusts.
        origin: the file and the part in it, for the message.

    Raises:
        LoadError: the name is unknown, its package is not in `plugins`, or the package has no such class.
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
    except (ImportError, ValueError) as error:  # ValueError: a name such as "my_pkg..networks"
        raise LoadError(f"{origin} is {name}, which cannot be imported: {error}") from error
    if not isinstance(found, type) or not issubclass(found, Configurable):
        raise LoadError(f"{origin} is {name}: {module} has no such subclass of PretrainedModel or Scheduler")
    return found


def fingerprint(network: nn.Module) -> str:
    """Hash of a network's tensors, their names and values."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(value.detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()[:16]

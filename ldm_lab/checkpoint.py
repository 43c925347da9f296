"""What a training checkpoint holds, and how one is written and read.

A checkpoint is what Lightning saves (`state_dict`, `optimizer_states`, `loops`, ...) and an entry
`ldm_lab` that makes the file explain itself:

    stage        "autoencoder" or "diffusion"
    images_seen  training images so far
    version      of this package
    configs      name -> config of each network (and of the scheduler), plain data
    prefixes     name -> where its tensors lie in `state_dict` (for the UNet: its moving average)

Everything is dicts, lists, strings, numbers and tensors, so `torch.load(weights_only=True)` reads it.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldm_lab.models.vq_model import VQModel
from ldm_lab.serialization import LoadError, PretrainedModel, read_json, read_torch, replacing

ENTRY = "ldm_lab"
STATUS = "status.json"


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


def networks(path: str | Path, classes: dict[str, type[PretrainedModel]]) -> dict[str, PretrainedModel]:
    """Rebuild networks from a checkpoint, in evaluation mode.

    Args:
        path: the file.
        classes: name -> class, for those wanted; the file cannot name a class.

    Raises:
        LoadError: the checkpoint does not hold one of them, or not all of its tensors.
    """
    state = load(path)
    entry = state[ENTRY]
    built = {}
    for name, kind in classes.items():
        if name not in entry["prefixes"]:
            raise LoadError(f"{path}: a checkpoint of stage {entry['stage']!r} holds no {name}")
        prefix = entry["prefixes"][name]
        tensors = {key[len(prefix) :]: value for key, value in state["state_dict"].items() if key.startswith(prefix)}
        with torch.device("meta"):
            model = kind.from_config(entry["configs"][name])
        model.load_weights(tensors, origin=str(path), assign=True)
        built[name] = model.eval()
    return built


def find(source: Path) -> Path:
    """The newest diffusion checkpoint of a run folder, a stage folder or the file itself."""
    candidates = [source, source / "diffusion/checkpoints/last.ckpt", source / "checkpoints/last.ckpt"]
    for path in candidates:
        if path.is_file():
            return path
    if not source.exists():
        raise LoadError(f"{source}: no such file or folder")
    raise LoadError(f"{source}: no pipeline (model_index.json) and no diffusion checkpoint to sample from")


def is_unfinished(run: Path) -> bool:
    """Whether the run's diffusion stage has trained on since its pipeline was exported."""
    status = run / "diffusion" / STATUS
    return status.is_file() and not read_json(status).get("finished")


def load_autoencoder(source: str | Path) -> VQModel:
    """A first stage from a model folder, a pipeline folder, a run folder or a training checkpoint.

    Raises:
        LoadError: none is there, or it is damaged; the message says how one is made.
    """
    source = Path(source)
    if source.is_file():
        return networks(source, {"vqvae": VQModel})["vqvae"]
    for folder in (source, source / "vqvae", source / "autoencoder/final", source / "final"):
        if (folder / VQModel.config_name).is_file():
            return VQModel.from_pretrained(folder)
    raise LoadError(f"{source}: there is no first stage here (a folder with {VQModel.config_name})")


def fingerprint(network: nn.Module) -> str:
    """A hash of a network's tensors, names and values, whatever file they came from."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(value.detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()[:16]

"""Reads and writes weight files: single or sharded with an index, safetensors or pickle, of any variant.

File names are those of diffusers. For the stem `diffusion_pytorch_model` and the variant `fp16`:

    diffusion_pytorch_model.fp16.safetensors                  all weights
    diffusion_pytorch_model.fp16-00001-of-00002.safetensors   a shard
        diffusion_pytorch_model.safetensors.index.fp16.json       the index: tensor -> shard
        diffusion_pytorch_model.safetensors.fp16.index.json       the index in older versions
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ldm_lab.utils.errors import UserError
from ldm_lab.utils.reading import LoadError, read_json, read_safetensors, read_torch
from ldm_lab.utils.terminal import say_once
from ldm_lab.utils.writing import replacing

STEM = "diffusion_pytorch_model"
OWN_STEM = "model"  # for classes that diffusers lacks, so that diffusers finds no weights and refuses
SAFE, PICKLED = "safetensors", "bin"  # pickles are read with weights_only
WEIGHTS, OWN_WEIGHTS, LEGACY_WEIGHTS = f"{STEM}.{SAFE}", f"{OWN_STEM}.{SAFE}", f"{STEM}.{PICKLED}"

_VARIANT = r"[\w-]+?"
_FILE = re.compile(
    rf"(?P<stem>{STEM}|{OWN_STEM})(?:"
    rf"(?:\.(?P<a>{_VARIANT}))?(?P<shard>-\d{{5}}-of-\d{{5}})?(?:\.(?P<b>{_VARIANT}))?\.(?:{SAFE}|{PICKLED})"
    rf"|\.(?:{SAFE}|{PICKLED})(?:\.(?P<c>{_VARIANT}))?\.index(?:\.(?P<d>{_VARIANT}))?\.json)",
    re.ASCII,
)
_SHARD = re.compile(r"\w[\w.-]{0,200}\.(bin|safetensors)", re.ASCII)  # not a path, so no file outside of the folder
_SIZE = re.compile(r"(\d+(?:\.\d+)?) *(?:([KMGT])(I?))?B?", re.ASCII)


def variants(names: Collection[str], stem: str | None = None) -> set[str | None]:
    """The variants that have weights among these file names; None is the plain variant."""
    found = (_FILE.fullmatch(name) for name in names)
    return {_variant(match) for match in found if match and stem in (None, match["stem"])}


def _variant(match: re.Match) -> str | None:
    return next((match[group] for group in "abcd" if match[group]), None)


def choose(
    names: Collection[str], stem: str = STEM, variant: str | None = None, use_safetensors: bool | None = None
) -> str:
    """Choose the file of the weights in a folder: a single file, or the index of shards.

    Args:
        names: names of the files in the folder.
        stem: stem of the weight files.
        variant: variant in diffusers' sense ("fp16"); None: the plain weights, or without plain weights the only
            variant.
        use_safetensors: True: only safetensors; False: only pickles; None: safetensors, else pickles.

    Raises:
        LoadError: there are no such weights; the message lists the variants.
    """
    kinds = {None: (SAFE, PICKLED), True: (SAFE,), False: (PICKLED,)}[use_safetensors]
    for kind in kinds:
        single, *indices = _names(stem, kind, variant)
        # diffusers leaves a stale index when it saves all weights again in one file.
        stale = single in names and not any(_is_shard(name, kind, variant) for name in names)
        for name in (single, *indices) if stale else (*indices, single):
            if name in names:
                return name
    there = variants([name for name in names if name.endswith((*kinds, ".json"))], stem)
    if variant is None and len(there) == 1 and there != {None}:
        return choose(names, stem, next(iter(there)), use_safetensors)
    wanted = [_names(stem, kind, variant)[0] for kind in kinds]
    others = [f"give variant={name!r}" if name else "leave variant= out" for name in sorted(there, key=str)]
    advice = f": {' or '.join(others)}" if others else ""
    raise LoadError(f"{'neither ' + ' nor '.join(wanted) if len(wanted) > 1 else 'no ' + wanted[0]} is there{advice}")


def _names(stem: str, kind: str, variant: str | None) -> tuple[str, ...]:
    """The name of the single file, and the possible names of the index."""
    if variant is None:
        return f"{stem}.{kind}", f"{stem}.{kind}.index.json"
    return f"{stem}.{variant}.{kind}", f"{stem}.{kind}.index.{variant}.json", f"{stem}.{kind}.{variant}.index.json"


def _is_shard(name: str, kind: str, variant: str | None) -> bool:
    match = _FILE.fullmatch(name)
    return bool(match and match["shard"]) and name.endswith(kind) and _variant(match) == variant


def read(
    folder: Path, stem: str = STEM, variant: str | None = None, use_safetensors: bool | None = None
) -> dict[str, Tensor]:
    """The tensors of a network's folder, on the CPU; see `choose`.

    Raises:
        LoadError: there are no safe weights, a shard is missing, or a file is corrupt.
    """
    names = {path.name for path in folder.glob(f"{stem}*") if path.is_file()}
    try:
        chosen = choose(names, stem, variant, use_safetensors)
    except LoadError as error:
        raise LoadError(f"{folder}: {error}") from error
    if variant is None and variants([chosen]) != {None}:
        say_once(f"{folder}: holds no other weights than those of {chosen}, which are taken")
    path = folder / chosen
    return _read_shards(path) if path.suffix == ".json" else _read_file(path)


def shards(index: Path) -> dict[str, set[str]]:
    """The shards that an index lists, with the names of their tensors; all are in the folder of the index.

    Raises:
        LoadError: the file is no index, or a name in it is a path.
    """
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise LoadError(f"{index}: has no weight_map, which says in which file a tensor lies")
    files: dict[str, set[str]] = {}
    for tensor, name in listed.items():
        if not isinstance(name, str) or not _SHARD.fullmatch(name):
            raise LoadError(f"{index}: {tensor} lies in {name!r}, which is no name of a file of weights beside it")
        files.setdefault(name, set()).add(tensor)
    return files


def _read_shards(index: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    files = shards(index)
    if missing := sorted(name for name in files if not (index.parent / name).is_file()):
        raise LoadError(f"{index}: {missing[0]} is not there ({len(missing)} of {len(files)} missing)")
    for name, tensors in files.items():
        part = _read_file(index.parent / name)
        if odd := sorted(tensors ^ part.keys()):
            raise LoadError(f"{index.parent / name}: {odd[0]} lies here or in {index.name}, but not in both")
        state |= part
    return state


def _read_file(path: Path) -> dict[str, Tensor]:
    if path.suffix == f".{PICKLED}":
        state = read_torch(path)
        if not are_named_tensors(state):
            raise LoadError(f"{path}: does not hold tensors by name")
        return state
    return read_safetensors(path)


def are_named_tensors(state: Any) -> bool:  # noqa: ANN401
    """Whether a file's content is a dict of tensors by name."""
    return isinstance(state, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items())


def write(
    folder: Path,
    tensors: dict[str, Tensor],
    stem: str = STEM,
    variant: str | None = None,
    safe_serialization: bool = True,
    max_shard_size: int | str | None = None,
) -> None:
    """Write tensors on the CPU into `folder`; replaces earlier weights of this variant.

    All files are on disk before the first one is renamed, so weights of two saves are never mixed.

    Args:
        folder: target folder; created if missing.
        tensors: tensors by name.
        stem: stem of the file names.
        variant: variant in the file names; None: the plain variant.
        safe_serialization: False writes pickles.
        max_shard_size: maximum bytes of a file, or a text such as "5GB"; larger weights are sharded. None: 10 GB.

    Raises:
        UserError: the size or the variant is invalid.
        SaveError: a file cannot be written.
    """
    if variant is not None and not re.fullmatch(r"[\w-]+", str(variant), re.ASCII):
        raise UserError(f"variant={variant!r}: give a word such as 'fp16'")
    kind = SAFE if safe_serialization else PICKLED
    parts = list(_split(tensors, _bytes("10GB" if max_shard_size is None else max_shard_size)))
    single, index = _names(stem, kind, variant)[:2]
    base, count = single.removesuffix(f".{kind}"), len(parts)
    names = [single] if count == 1 else [f"{base}-{number:05}-of-{count:05}.{kind}" for number in range(1, count + 1)]
    files = dict(zip(names, parts, strict=True))
    with contextlib.ExitStack() as stack:  # the last file entered is renamed first
        if count > 1:
            _write_index(stack.enter_context(replacing(folder / index)), files)
        for name, part in files.items():
            _write_file(stack.enter_context(replacing(folder / name)), part, safe_serialization)
        if count > 1:
            (folder / index).unlink(missing_ok=True)  # its shards are about to change
    _remove_others(folder, stem, variant, {*files, index} if count > 1 else {single})


def _write_file(path: Path, tensors: dict[str, Tensor], safe: bool) -> None:
    if safe:
        save_file(tensors, path, metadata={"format": "pt"})  # diffusers requires this entry
        return
    with open(path, "wb") as file:  # not a path, as torch's own writer loses the disk's error
        torch.save(tensors, file)


def _write_index(path: Path, files: dict[str, dict[str, Tensor]]) -> None:
    size = sum(value.nbytes for part in files.values() for value in part.values())
    listed = {tensor: name for name, part in files.items() for tensor in part}
    index = {"metadata": {"total_size": size}, "weight_map": listed}
    path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _split(tensors: dict[str, Tensor], limit: int) -> Iterator[dict[str, Tensor]]:
    """Split tensors, in order, into shards of at most `limit` bytes, with at least one tensor each."""
    part: dict[str, Tensor] = {}
    size = 0
    for key, value in tensors.items():
        if part and size + value.nbytes > limit:
            yield part
            part, size = {}, 0
        part[key] = value
        size += value.nbytes
    yield part


def _bytes(size: int | str) -> int:
    """Parse 5, "5GB" or "200 KiB" as a number of bytes. Raises `UserError` for anything else."""
    match = _SIZE.fullmatch(str(size).strip().upper())
    power = "KMGT".index(match[2]) + 1 if match and match[2] else 0
    number = int(float(match[1]) * (1024 if match[3] else 1000) ** power) if match else 0
    if number < 1:
        raise UserError(f"max_shard_size={size!r}: give a number of bytes, or a text such as '5GB' or '200KB'")
    return number


def _remove_others(folder: Path, stem: str, variant: str | None, written: set[str]) -> None:
    """Remove earlier weights of this variant in other files; indices first, so that no index lists missing shards."""
    names = {path.name for path in folder.glob(f"{stem}*")} - written
    stale = (name for name in names if variants([name], stem) == {variant})
    for name in sorted(stale, key=lambda name: not name.endswith(".json")):
        (folder / name).unlink(missing_ok=True)

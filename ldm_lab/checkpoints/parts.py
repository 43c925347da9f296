"""Reads and writes the three parts of a pipeline: first stage, UNet and scheduler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm_lab.checkpoints import checkpoint, compvis
from ldm_lab.utils.compiled import unwrapped
from ldm_lab.utils.hub import INDEX, PIPELINES
from ldm_lab.utils.reading import LoadError, blaming, read_json
from ldm_lab.utils.terminal import say_once
from ldm_lab.utils.weights import variants
from ldm_lab.utils.writing import write_json

Classes = Mapping[str, tuple[type, ...]]
NETWORKS = ("vqvae", "unet")


def read(
    path: Path,
    classes: Classes,
    given: Mapping[str, Any] | None = None,
    plugins: Sequence[str] = (),
    variant: str | None = None,
    use_safetensors: bool | None = None,
    single_file: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Load the parts of a pipeline from a folder of this package or of diffusers, or from a checkpoint.

    Args:
        path: the folder or file.
        classes: allowed classes of this package for each part.
        given: parts by name to use instead of reading them.
        plugins: packages whose classes the files may name too.
        variant: see `weights.choose`; a network without it loads its plain weights, unless no network has it.
        use_safetensors: see `weights.choose`.
        single_file: arguments of `compvis.read`, for a CompVis checkpoint; None: detect the kind of file.

    Raises:
        LoadError: a part is missing, corrupt, or of an unknown class.
    """
    given = given or {}
    if single_file is not None:
        return _of_checkpoint(path, compvis.read(path, **single_file), classes, given, plugins)
    if path.is_dir():
        return _of_folder(path, classes, given, plugins, variant, use_safetensors)
    if variant is not None or use_safetensors:
        raise LoadError(f"{path}: variant= and use_safetensors=True are for folders, and this is a checkpoint")
    return _of_checkpoint(path, checkpoint.parts(path), classes, given, plugins)


def _of_folder(
    folder: Path,
    classes: Classes,
    given: Mapping[str, Any],
    plugins: Sequence[str],
    variant: str | None,
    use_safetensors: bool | None,
) -> dict[str, Any]:
    index = read_json(folder / INDEX)
    if (kind := index.get("_class_name")) not in PIPELINES:
        raise LoadError(f"{folder / INDEX}: a {kind!r}, not an LDMPipeline: unconditional latent diffusion alone")
    with_variant = _with_variant(folder, variant, given)
    parts = dict(given)
    for name in (name for name in classes if name not in given):
        kind = _class(index.get(name), classes[name], plugins, f"{folder / INDEX}: {name}")
        choice = {"variant": variant if name in with_variant else None, "use_safetensors": use_safetensors}
        parts[name] = kind.from_pretrained(folder / name, **(choice if name in NETWORKS else {}))
    return parts


def _class(entry: Any, kinds: tuple[type, ...], plugins: Sequence[str], origin: str) -> type:  # noqa: ANN401
    """The class that an entry of `model_index.json` names."""
    wanted = ".".join(map(str, entry)) if isinstance(entry, list) else str(entry)
    known = {f"{library}.{kind.__name__}": kind for library in checkpoint.LIBRARIES for kind in kinds}
    return checkpoint.class_named(wanted, known, plugins, origin)


def _with_variant(folder: Path, variant: str | None, given: Mapping[str, Any]) -> set[str]:
    """Names of the networks that have weights of the variant. Raises `LoadError` if none has."""
    files = {name: {path.name for path in (folder / name).glob("*")} for name in NETWORKS if name not in given}
    found = {name for name, names in files.items() if variant in variants(names)}
    if variant is None or not files:
        return found
    if not found:
        known = sorted({str(other) for names in files.values() for other in variants(names) if other})
        raise LoadError(f"{folder}: no weights of variant={variant!r}; variants that are there: {known or 'none'}")
    for name in files.keys() - found:
        say_once(f"{folder / name}: has no weights of variant={variant!r}: the plain ones are taken")
    return found


def _of_checkpoint(
    path: Path, parts: Mapping[str, checkpoint.Part], classes: Classes, given: Mapping[str, Any], plugins: Sequence[str]
) -> dict[str, Any]:
    built = dict(given)
    for name in (name for name in NETWORKS if name not in given):
        built[name] = checkpoint.network(parts, name, classes[name], plugins, str(path))
    if "scheduler" in built:
        return built
    if "scheduler" not in parts:
        raise LoadError(f"{path}: this checkpoint holds no scheduler, only {', '.join(parts)}")
    config = parts["scheduler"].config
    kind = checkpoint.class_of(config, classes["scheduler"], plugins, f"{path}: scheduler")
    with blaming(path):
        built["scheduler"] = kind.from_config(config)
    return built


def write(folder: Path, components: Mapping[str, Any], **files: Any) -> None:  # noqa: ANN401
    """Write the parts of a pipeline, and `model_index.json` last.

    Args:
        folder: target folder; created if missing.
        components: the parts; a network may be compiled or wrapped.
        files: see `PretrainedModel.save_pretrained`.
    """
    components = {name: unwrapped(part) for name, part in components.items()}
    for name, part in components.items():
        part.save_pretrained(folder / name, **(files if name in NETWORKS else {}))
        if _library(part) != "diffusers":
            kind = f"{_library(part)}.{type(part).__name__}"
            say_once(
                f"{name} is written as {kind}, which diffusers does not have, or not in its LDMPipeline: there this"
                " model will not load"
            )
    index = {name: [_library(part), type(part).__name__] for name, part in components.items()}
    write_json(folder / INDEX, {"_class_name": "LDMPipeline", "_diffusers_version": "0.42.1", **index})


def _library(part: Any) -> str:  # noqa: ANN401
    """The library of a part's class in `model_index.json`; schedulers of diffusers do not define it themselves."""
    return getattr(part, "library", type(part).__module__.split(".")[0])

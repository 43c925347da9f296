"""Resolves the user's sources: a model to sample from, existing images, and the reference images."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm_lab.checkpoints import locate
from ldm_lab.data.avatars import AvatarImages
from ldm_lab.data.dataset import ImageDataset
from ldm_lab.data.drawn import DrawnImages, drawn_or_folder
from ldm_lab.data.hub import HubImages
from ldm_lab.data.images import FolderImages
from ldm_lab.data.storage.archives import ARCHIVES
from ldm_lab.metrics.images import ArrayPixels, DataPixels, Pixels, WholeFolder
from ldm_lab.metrics.reference import names, read_header
from ldm_lab.runs.stages import STAGES
from ldm_lab.sampling import generate
from ldm_lab.sampling.files import SampleFiles
from ldm_lab.utils import signatures
from ldm_lab.utils.errors import UserError, one_line
from ldm_lab.utils.nested import find
from ldm_lab.utils.pixels import RGB_8_BIT, PixelFormat
from ldm_lab.utils.reading import LoadError, blaming, read_json, read_yaml
from ldm_lab.utils.urls import is_url, masked

CONFIG = "config.yaml"
SETS = (AvatarImages, FolderImages, HubImages, DrawnImages, drawn_or_folder)
KNOWN = {f"{kind.__module__}.{kind.__name__}": kind for kind in SETS}  # the only classes that a config may call


@dataclass(frozen=True)
class Target:
    """The real images to compare with.

    Attributes:
        images: real images; `None` if there are only their statistics.
        statistics: file of statistics.
        held_out: real images outside of the training set; `None` without held-out images.
        known: real images that an extractor may train on.
        transform: the transform that the header of the statistics must have.
    """

    images: Pixels | None = None
    statistics: Path | None = None
    held_out: Pixels | None = None
    known: Pixels | None = None
    transform: dict[str, Any] = field(default_factory=dict)


def state_of(source: str) -> locate.State | None:
    """The model that `source` names; `None` if it names images (a folder, an archive, an `.npz`).

    Raises:
        LoadError: the source does not exist.
    """
    path = Path(source)
    if path.suffix == ".npz" or (path.is_file() and path.suffix in (*ARCHIVES, ".npy")):
        return None
    if path.is_dir() and locate.search(path, "diffusion") is None:
        return None
    return locate.find(source)


def images_of(
    source: str, size: Sequence[int] | None = None, max_pixels: int | None = None, pixels: PixelFormat = RGB_8_BIT
) -> Pixels:
    """Existing images to evaluate.

    Args:
        source: an `.npz`, a folder or archive, or an output folder of `sample.py`.
        size: (height, width) to resize and crop to, as the data loader does; None: no resizing.
        max_pixels: maximum pixels of an image file; None: Pillow's limit.
        pixels: channels and range of the images, where no manifest of `sample.py` says them.

    Raises:
        UserError: the images differ in size.
        LoadError: there are no images.
    """
    path = Path(source)
    if path.suffix == ".npz":
        return ArrayPixels(path)
    samples, values = path, of_format(pixels)
    if (manifest := path / generate.MANIFEST).is_file():
        samples, files = path / "images", files_of(manifest)
        pixels, values = files.pixels, {"channels": files.channels, "value_range": files.stored_range}
    if size:
        return DataPixels(WholeFolder(samples, size, max_pixels, **values), source, pixels=pixels)
    first = WholeFolder(samples, 1, max_pixels, **values).read(0)
    as_they_are = AsTheyAre(samples, (first.height, first.width), max_pixels, **values)
    return DataPixels(as_they_are, source, pixels=pixels)


def of_format(pixels: PixelFormat) -> dict[str, Any]:
    """Arguments of `WholeFolder` for files of these channels and values."""
    return {"channels": pixels.channels, "value_range": None if pixels.is_picture else pixels.value_range}


def files_of(manifest: Path) -> SampleFiles:
    """The kind of files that a manifest of `sample.py` describes. Raises `LoadError` if it cannot be read."""
    with blaming(manifest):
        found = SampleFiles(**read_json(manifest).get("files", {}))
        _ = found.pixels  # raises for an impossible range
    return found


class AsTheyAre(WholeFolder):
    """Images that must have one size, as silently resizing generated images would make metrics wrong."""

    def read(self, index: int) -> Any:  # noqa: ANN401
        """Image `index`. Raises `UserError` if it has another size."""
        image = super().read(index)
        if (image.height, image.width) != self.image_size:
            height, width = self.image_size
            raise UserError(
                f"{self.path(index)} has {image.width} x {image.height} pixels, the first image of the folder"
                f" {width} x {height}: --image-size resizes all of them as the loader does"
            )
        return image

    def transform(self) -> dict[str, Any]:
        """The images are not transformed."""
        return {"image_size": list(self.image_size)}


def home(source: str, state: locate.State | None) -> Path:
    """Folder of evaluations: `eval/` in a model's folder; for a file or images, in a folder beside it."""
    path = state.source if state else Path(source)
    return path / "eval" if state and path.is_dir() else path.with_name(f"{path.stem}_eval")


def run_data(
    source: Path, plugins: Sequence[str] = (), cache_dir: str | None = None, most: int | None = None
) -> Target | None:
    """The data that a run was trained on; `None` if the source has no stage's `config.yaml`.

    Args:
        source: folder of a run or a stage, or a checkpoint in one.
        plugins: packages whose data sets the config may name.
        cache_dir: folder of drawn images; None: as in the run's config.
        most: maximum number of images to compare with.

    Raises:
        LoadError: the config names an unknown data set.
        UserError: the images do not exist any more.
    """
    folders = [*(source / stage for stage in reversed(STAGES)), source, *source.parents[:2]]
    path = next((folder / CONFIG for folder in folders if (folder / CONFIG).is_file()), None)
    module = find(read_yaml(path), "data.module") if path else None
    if not isinstance(module, dict):
        return None
    train, val = (_built(path, module.get(name), plugins, cache_dir) for name in ("train_set", "val_set"))
    label = f"training images of {path.parent}"
    known = DataPixels(train, label)
    return Target(DataPixels(train, label, most), None, DataPixels(val, "held-out images"), known, known.transform())


def _built(path: Path, node: Any, plugins: Sequence[str], cache_dir: str | None) -> ImageDataset:  # noqa: ANN401
    """Build the data set of a config node; a config may only call `KNOWN` and classes of plugins."""
    settings = dict(node) if isinstance(node, dict) else {}
    target = str(settings.pop("_target_", None))
    module, _, name = target.rpartition(".")
    if target not in KNOWN and target.split(".")[0] not in plugins:
        raise LoadError(f"{path}: data of class {target}: give --plugins with its package, or the images with --data")
    kind = KNOWN.get(target) or getattr(importlib.import_module(module), name)
    if cache_dir and "cache_dir" in settings:
        settings["cache_dir"] = cache_dir
    try:
        signatures.check(kind, (), settings)
        return kind(**settings)
    except UserError as error:
        raise LoadError(f"{path}: {one_line(error)}; the images can be named with --data") from error


def named_data(
    name: str,
    size: Sequence[int],
    of_run: Target | None,
    most: int | None = None,
    max_pixels: int | None = None,
    pixels: PixelFormat = RGB_8_BIT,
    cache_dir: str | Path | None = None,
) -> Target:
    """The target of `--data`: statistics, images in an `.npz`, or all images of a folder, an archive or a store.

    Args:
        name: the name as typed.
        size: (height, width) of the evaluated images.
        of_run: data of the evaluated run, if any.
        most: maximum number of images to compare with.
        max_pixels: maximum pixels of an image file; None: Pillow's limit.
        pixels: channels and range of the evaluated images.
        cache_dir: folder for copies of what a store holds.

    Raises:
        LoadError: the data cannot be used.
    """
    path = Path(name)
    if path.suffix != ".npz":
        place = name if is_url(name) else path
        known = DataPixels(WholeFolder(place, size, max_pixels, cache_dir=cache_dir, **of_format(pixels)), masked(name))
        return Target(DataPixels(known.data, known.source, most), known=known)
    if not path.is_file():
        raise LoadError(f"--data {name}: no such file")
    if read_header(path) is None and "arr_0" in names(path):
        images = ArrayPixels(path, most)
        statistics = path if {"mu", "sigma"} <= set(names(path)) else None
        return Target(images, statistics, known=images)
    transform = of_run.transform if of_run else {"image_size": list(size)}
    return Target(None, path, known=of_run and of_run.known, transform=transform)

"""What images are compared with: features of real ones, and a header that says of which, seen how, by what.

A statistics file is an `.npz` without pickles:

    header    JSON: `source`, `fingerprint`, `count`, `transform` of the images; name and fingerprint of the extractor
    features  `(N, D)`, float32
    mu, sigma mean `(D,)` and covariance `(D, D)`, float64, as other tools name them

Files of the ADM evaluator have `mu` and `sigma` of Inception's features, and some of the images (`arr_0`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm_lab.metrics.distribution import Gaussian, gaussian
from ldm_lab.metrics.extractors import Extractor
from ldm_lab.metrics.images import Pixels, open_array
from ldm_lab.utils.reading import LoadError, check_plain, reason
from ldm_lab.utils.writing import replacing

HEADER_KEYS = {"source", "fingerprint", "count", "transform", "extractor"}


@dataclass(frozen=True)
class Reference:
    """Real images, as an extractor sees them.

    Attributes:
        header: see above.
        features: `(N, D)`, float32; `None` where a file has their statistics alone.
        statistics: given where a file has them, else of the features.
    """

    header: dict[str, Any]
    features: Tensor | None
    statistics: Gaussian | None = None

    @cached_property
    def gaussian(self) -> Gaussian:
        """Mean and covariance."""
        return self.statistics or gaussian(self.features)

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        arrays = {"mu": self.gaussian.mean.cpu().numpy(), "sigma": self.gaussian.covariance.cpu().numpy()}
        with replacing(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, header=np.array(json.dumps(self.header)), features=self.features.cpu().numpy(), **arrays)


def header(images: Pixels, extractor: Extractor) -> dict[str, Any]:
    """What a statistics file says of its images and of the extractor."""
    return {
        "source": images.source,
        "fingerprint": images.fingerprint(),
        "count": len(images),
        "transform": images.transform(),
        "extractor": describe(extractor),
    }


def describe(extractor: Extractor) -> dict[str, str]:
    """Name and fingerprint."""
    return {"name": extractor.name, "fingerprint": extractor.fingerprint()}


def read_header(path: Path) -> dict[str, Any] | None:
    """The header of a statistics file; `None` for an `.npz` of another kind. Raises `LoadError` for no `.npz`."""
    if "header" not in names(path):
        return None
    try:
        with np.load(path, allow_pickle=False) as arrays:
            found = json.loads(str(arrays["header"]))
    except (ValueError, RecursionError) as error:
        raise LoadError(f"{path}: its header is no JSON") from error
    found = check_plain(found, f"{path}: header")
    if not found.keys() >= HEADER_KEYS:
        raise LoadError(f"{path}: its header lacks {', '.join(sorted(HEADER_KEYS - found.keys()))}")
    return found


def names(path: Path) -> list[str]:
    """Of the arrays in an `.npz`. Raises `LoadError` where it is none."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return list(arrays.keys())
    except Exception as error:  # a damaged archive makes the reader fail in several ways
        raise LoadError(f"{path}: no .npz: {reason(path, error)}") from error


def load(path: Path, extractor: Extractor, transform: dict[str, Any]) -> Reference:
    """A statistics file, or one of the ADM evaluator with `mu` and `sigma`.

    Args:
        path: the file.
        extractor: of the images that are compared with it.
        transform: of these; what it says must be what the file says.

    Raises:
        LoadError: the file is none, or of another extractor, size or preprocessing.
    """
    said = read_header(path)
    if said is None:
        return _foreign(path, extractor)
    check_same(path, "extractor", said["extractor"], describe(extractor))
    for key in transform.keys() & said["transform"].keys():
        check_same(path, f"transform.{key}", said["transform"][key], transform[key])
    features = torch.from_numpy(np.array(open_array(path, "features")))
    if features.ndim != 2 or features.shape[1] != extractor.dimension or len(features) < 2:
        raise LoadError(f"{path}: features are {tuple(features.shape)}, not (N, {extractor.dimension})")
    return Reference(said, features)


def check_same(path: Path, what: str, there: Any, here: Any) -> None:  # noqa: ANN401
    """Raise `LoadError` where a statistics file says something else than what it is compared with."""
    if there != here:
        raise LoadError(
            f"{path}: other statistics: {what} is {there} there and {here} here; distances would be wrong. Give the"
            " images themselves with --data FOLDER, or statistics that are made alike (--save-reference)"
        )


def _foreign(path: Path, extractor: Extractor) -> Reference:
    """Statistics that do not say of what: taken for Inception's alone, whose features all tools mean by them."""
    if not {"mu", "sigma"} <= set(names(path)):
        raise LoadError(f"{path}: has neither a header, nor mu and sigma, nor images (arr_0)")
    mean, covariance = (torch.from_numpy(np.array(open_array(path, name))).double() for name in ("mu", "sigma"))
    size = extractor.dimension
    if extractor.distance != "fid" or mean.shape != (size,) or covariance.shape != (size, size):
        raise LoadError(
            f"{path}: mu and sigma are of {tuple(mean.shape)} features of Inception, not of {extractor.name}: give"
            " --features inception, or the images with --data FOLDER"
        )
    what = {"source": str(path), "fingerprint": None, "count": None, "transform": None}
    return Reference({**what, "extractor": describe(extractor)}, None, Gaussian(mean, covariance))

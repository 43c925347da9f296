"""Reference sets: features of real images, with a header on the images, their transform and the extractor.

A statistics file is an `.npz` without pickles:

    header    JSON: `source`, `fingerprint`, `count`, `transform` of the images; name and fingerprint of the extractor
    features  `(N, D)`, float32
    mu, sigma mean `(D,)` and covariance `(D, D)`, float64, under the names of other tools

    Files of the ADM evaluator have `mu` and `sigma` of Inception's features, and some of them images (`arr_0`).
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
    """Features of real images.

    Attributes:
        header: see above.
        features: `(N, D)`, float32; `None` if a file has only statistics.
        statistics: mean and covariance from a file; None: computed from the features.
    """

    header: dict[str, Any]
    features: Tensor | None
    statistics: Gaussian | None = None

    @cached_property
    def gaussian(self) -> Gaussian:
        """Mean and covariance."""
        return self.statistics or gaussian(self.features)

    def save(self, path: Path) -> None:
        """Write the file atomically."""
        arrays = {"mu": self.gaussian.mean.cpu().numpy(), "sigma": self.gaussian.covariance.cpu().numpy()}
        with replacing(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, header=np.array(json.dumps(self.header)), features=self.features.cpu().numpy(), **arrays)


def header(images: Pixels, extractor: Extractor) -> dict[str, Any]:
    """The header of a statistics file."""
    return {
        "source": images.source,
        "fingerprint": images.fingerprint(),
        "count": len(images),
        "transform": images.transform(),
        "extractor": describe(extractor),
    }


def describe(extractor: Extractor) -> dict[str, str]:
    """Name and fingerprint of an extractor."""
    return {"name": extractor.name, "fingerprint": extractor.fingerprint()}


def read_header(path: Path) -> dict[str, Any] | None:
    """The header of a statistics file; `None` for another `.npz`. Raises `LoadError` if the file is no `.npz`."""
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
    """Names of the arrays in an `.npz`. Raises `LoadError` if the file is no `.npz`."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return list(arrays.keys())
    except Exception as error:  # the reader raises various errors on corrupt archives
        raise LoadError(f"{path}: no .npz: {reason(path, error)}") from error


def load(path: Path, extractor: Extractor, transform: dict[str, Any]) -> Reference:
    """Load a statistics file, or a file of the ADM evaluator with `mu` and `sigma`.

    Args:
        path: the file.
        extractor: extractor of the evaluated images.
        transform: transform of the evaluated images; it must equal the transform in the file.

    Raises:
        LoadError: the file holds no statistics, or is of another extractor, size or preprocessing.
    """
    stored = read_header(path)
    if stored is None:
        return _foreign(path, extractor)
    check_same(path, "extractor", stored["extractor"], describe(extractor))
    for key in transform.keys() & stored["transform"].keys():
        check_same(path, f"transform.{key}", stored["transform"][key], transform[key])
    features = torch.from_numpy(np.array(open_array(path, "features")))
    if features.ndim != 2 or features.shape[1] != extractor.dimension or len(features) < 2:
        raise LoadError(f"{path}: features are {tuple(features.shape)}, not (N, {extractor.dimension})")
    return Reference(stored, features)


def check_same(path: Path, what: str, there: Any, here: Any) -> None:  # noqa: ANN401
    """Raise `LoadError` if an entry of a statistics file differs from that of the evaluated images."""
    if there != here:
        raise LoadError(
            f"{path}: other statistics: {what} is {there} there and {here} here; distances would be wrong. Give the"
            " images themselves with --data FOLDER, or statistics that are made alike (--save-reference)"
        )


def _foreign(path: Path, extractor: Extractor) -> Reference:
    """Statistics without a header: accepted only for Inception, whose features all tools store."""
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

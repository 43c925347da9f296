"""Feature extractors for distances between sets of images."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm_lab.checkpoints.checkpoint import fingerprint
from ldm_lab.metrics.images import like
from ldm_lab.utils import float32
from ldm_lab.utils.errors import UserError, first_line
from ldm_lab.utils.images import as_rgb
from ldm_lab.utils.reading import LoadError, read_torch

CHUNK = 32  # images at a time, constant so that features depend neither on batch size nor on number of devices
LACKING = "it is not installed: pip install -e '.[metrics]'"


class Extractor(nn.Module):
    """`extractor(images)`: images `(B, C, H, W)` of `Pixels` -> features `(B, dimension)`, float32.

    Attributes:
        name: name of the extractor.
        distance: name of the Fréchet distance of its features.
        dimension: D.
    """

    name: str
    distance: str
    dimension: int

    def fingerprint(self) -> str:
        """A short text that changes with the features."""
        return fingerprint(self)

    def forward(self, images: Tensor) -> Tensor:
        """`(B, C, H, W)`, uint8 or float32 in [-1, 1] -> `(B, D)`, float32."""
        raise NotImplementedError


class Inception(Extractor):
    """The 2048 pooled features of Inception-v3 (2015), as in the original FID, through torch-fidelity.

    The network resizes images as TensorFlow 1 did.

    Args:
        weights: torch-fidelity's file of weights; None: from torch's hub cache, downloaded if missing.

    Raises:
        UserError: torch-fidelity is not installed, or the weights are not available.
        LoadError: the file holds other weights.
    """

    name, distance, dimension = "inception-v3-compat", "fid", 2048

    def __init__(self, weights: str | Path | None = None) -> None:
        super().__init__()
        try:
            from torch_fidelity import feature_extractor_inceptionv3 as module
        except ImportError as error:
            raise UserError(f"--features inception is computed by torch-fidelity; {LACKING}") from error
        with had(module.URL_INCEPTION_V3, weights, "inception"):
            self.network = module.FeatureExtractorInceptionV3(
                self.name, ["2048"], feature_extractor_weights_path=weights and read_again(Path(weights)), verbose=False
            )

    def forward(self, images: Tensor) -> Tensor:
        """`(B, 3, H, W)` or `(B, 1, H, W)`, uint8 or float32 in [-1, 1] -> `(B, 2048)`, float32."""
        return self.network(rgb_8_bit(images))[0]


def rgb_8_bit(images: Tensor) -> Tensor:
    """Images of one channel or three, uint8 or in [-1, 1] -> `(B, 3, H, W)`, uint8: grey is repeated."""
    return as_rgb(images if images.dtype == torch.uint8 else like(images, torch.uint8)).contiguous()


def read_again(path: Path) -> io.BytesIO:
    """Read a file of weights safely and write it to memory, as torch-fidelity's own reading could execute code."""
    buffer = io.BytesIO()
    torch.save(read_torch(path), buffer)
    buffer.seek(0)
    return buffer


@contextlib.contextmanager
def had(url: str, weights: str | Path | None, features: str) -> Iterator[None]:
    """Context that turns any failure into a one-line error on missing weights, with advice."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except LoadError:
        raise
    except Exception as error:  # corrupt files and network failures raise almost anything
        if weights is not None:
            raise LoadError(f"--weights {weights}: holds no weights of {url}: {first_line(error)}") from error
        raise UserError(
            f"--features {features} needs {url}, which cannot be had ({first_line(error)}): fetch the file elsewhere"
            " and give --weights FILE, or take --features own, which the project trains on the data set itself"
        ) from error


@contextlib.contextmanager
def exactly(device: torch.device) -> Iterator[None]:
    """Context of full float32 precision and deterministic results, whatever the settings of training and sampling."""
    same = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True)
    with torch.no_grad(), torch.autocast(device.type, enabled=False), same, float32.exact():
        yield

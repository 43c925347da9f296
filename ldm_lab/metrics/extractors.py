"""Networks that turn images into features, for distances between sets of images."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm_lab.checkpoints.checkpoint import fingerprint
from ldm_lab.utils import float32
from ldm_lab.utils.errors import UserError, first_line
from ldm_lab.utils.reading import LoadError, read_torch

CHUNK = 32  # images at a time: a constant, so that features depend neither on batch size nor on number of devices
LACKING = "it is not installed: pip install -e '.[metrics]'"


class Extractor(nn.Module):
    """`extractor(images)`: `(B, 3, H, W)` uint8 -> features `(B, dimension)`, float32.

    Attributes:
        name: of the extractor.
        distance: what the Fréchet distance of its features is called.
        dimension: D.
    """

    name: str
    distance: str
    dimension: int

    def fingerprint(self) -> str:
        """A short text that changes with the features."""
        return fingerprint(self)

    def forward(self, images: Tensor) -> Tensor:
        """`(B, 3, H, W)`, uint8 -> `(B, D)`, float32."""
        raise NotImplementedError


class Inception(Extractor):
    """Inception-v3 of 2015, its 2048 pooled features, as the originals' FID has them, through torch-fidelity.

    Images are resized as TensorFlow 1 did, inside the network.

    Args:
        weights: torch-fidelity's file of weights; None takes it from torch's hub cache or downloads it into it.

    Raises:
        UserError: torch-fidelity is not installed, or the weights cannot be had.
        LoadError: the file holds something else.
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
        """`(B, 3, H, W)`, uint8 -> `(B, 2048)`, float32."""
        return self.network(images)[0]


def read_again(path: Path) -> io.BytesIO:
    """A file of weights, read here and written into memory: torch-fidelity reads in a way that could run code."""
    buffer = io.BytesIO()
    torch.save(read_torch(path), buffer)
    buffer.seek(0)
    return buffer


@contextlib.contextmanager
def had(url: str, weights: str | Path | None, features: str) -> Iterator[None]:
    """What fails in this block fails for want of weights: one line says what to do."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except LoadError:
        raise
    except Exception as error:  # a damaged file, and the network, make the readers fail in any way there is
        if weights is not None:
            raise LoadError(f"--weights {weights}: holds no weights of {url}: {first_line(error)}") from error
        raise UserError(
            f"--features {features} needs {url}, which cannot be had ({first_line(error)}): fetch the file elsewhere"
            " and give --weights FILE, or take --features own, which the project trains on the data set itself"
        ) from error


@contextlib.contextmanager
def exactly(device: torch.device) -> Iterator[None]:
    """Full float32, and the same numbers each time, whatever training and sampling compute in."""
    same = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True)
    with torch.no_grad(), torch.autocast(device.type, enabled=False), same, float32.exact():
        yield

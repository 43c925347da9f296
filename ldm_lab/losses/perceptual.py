"""Perceptual distances between images: LPIPS, and a distance without pretrained weights."""

from __future__ import annotations

import pickle
from importlib.resources import files
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import VGG16_Weights, vgg16

from ldm_lab.models.layout import LaidOut
from ldm_lab.utils.arguments import require_positive
from ldm_lab.utils.errors import UserError, first_line
from ldm_lab.utils.reading import reason

_TAPS = (3, 8, 15, 22, 29)  # indices of relu1_2, relu2_2, relu3_3, relu4_3, relu5_3 in VGG16's features
_READ_ERRORS = (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError)


class PerceptualDistance(nn.Module):
    """Interface of a perceptual distance: `forward(reconstruction, target)` returns a distance per image.

    Attributes:
        smallest_side: least height and width of the images.
    """

    smallest_side: int = 1

    def setup(self) -> None:
        """Load the files that the distance needs, so that missing files raise before training starts."""

    def forward(self, reconstruction: Tensor, target: Tensor) -> Tensor:
        """`(B, C, H, W)` twice, in [-1, 1] -> `(B,)`, float32, zero for equal images."""
        raise NotImplementedError


class MultiScaleL1(PerceptualDistance):
    """L1 between image pyramids and between their gradients; weights edges and coarse shapes, needs no weights.

    With e_s the difference of the images at level s (each level averages 2 × 2 pixels of the level before),
    d = Σ_s mean|e_s| + mean|∂x e_s| + mean|∂y e_s|, divided by the number of levels. ∂ is the
    difference of neighbouring pixels.

    Args:
        levels: levels of the pyramid, full resolution included. Images need sides of at least `2**levels`.

    Raises:
        UserError: there is no level.
    """

    def __init__(self, levels: int = 3) -> None:
        super().__init__()
        require_positive(levels=levels)
        self.levels = levels
        self.smallest_side = 2**levels

    def forward(self, reconstruction: Tensor, target: Tensor) -> Tensor:
        """`(B, C, H, W)` twice, in [-1, 1] -> `(B,)`, float32."""
        # Averaging and differences are linear, so one pyramid of the difference is enough.
        error = reconstruction.float() - target.float()
        distance = error.new_zeros(len(error))
        for level in range(self.levels):
            if level > 0:
                error = F.avg_pool2d(error, 2)  # (B, C, H, W) -> (B, C, H/2, W/2)
            for part in (error, error.diff(dim=-1), error.diff(dim=-2)):
                distance = distance + part.abs().mean(dim=(1, 2, 3))
        return distance / self.levels


class LPIPS(PerceptualDistance):
    """Learned perceptual image patch similarity, version 0.1 with VGG16 (Zhang et al. 2018, arXiv 1801.03924, Eq. 1).

    VGG16 sees RGB: a single channel is repeated three times.

    d = Σ_l mean_hw w_l · (ŷ_l - x̂_l)², where ŷ_l, x̂_l are the features of layer l, each position scaled to
    unit length, and w_l are the learned non-negative weights per channel (those that torchmetrics ships).

    The network is loaded once, by `setup` or on first use. It is frozen, moves to the device of the images,
    and is not a submodule, so checkpoints, optimizers and DDP do not see it. Features are computed at the
    precision of the surrounding autocast, the distance in float32.

    Args:
        weights: state dict of torchvision's VGG16 (the file `vgg16-397923af.pth`), complete or only its
            `features`. `None`: from torch's hub cache, downloaded if missing. (torchvision's other file,
            `IMAGENET1K_FEATURES`, expects images of another scale and does not fit the learned weights.)
    """

    smallest_side = 16
    shift = (-0.030, -0.088, -0.188)  # mean and standard deviation of ImageNet, for images in [-1, 1]
    scale = (0.458, 0.448, 0.450)

    def __init__(self, weights: str | Path | None = None) -> None:
        super().__init__()
        self.weights = weights
        self._networks: tuple[nn.Module, ...] = ()  # a tuple, as a module attribute would become a submodule

    def setup(self) -> None:
        """Load the network, unless it is loaded.

        Raises:
            UserError: VGG16's weights are not available, or the file holds other weights.
        """
        if not self._networks:
            statistics = nn.ParameterList(torch.tensor(values).view(1, 3, 1, 1) for values in (self.shift, self.scale))
            parts = {"statistics": statistics, "features": _vgg16_features(self.weights), "heads": _linear_heads()}
            network = _Networks(parts).eval().requires_grad_(False)
            network.lay_out()  # now, as it is impossible on fake tensors later
            self._networks = (network,)

    def forward(self, reconstruction: Tensor, target: Tensor) -> Tensor:
        """`(B, 3, H, W)` or `(B, 1, H, W)` twice, in [-1, 1], sides of at least 16 -> `(B,)`, float32."""
        network = self._network(reconstruction.device)
        distance = reconstruction.new_zeros(len(reconstruction), dtype=torch.float32)
        layers = zip(self._features(network, reconstruction), self._features(network, target), strict=True)
        for weight, (x, y) in zip(network["heads"], layers, strict=True):
            squared = (_unit_length(x) - _unit_length(y)).square()  # (B, C, h, w)
            distance = distance + (weight * squared.mean(dim=(2, 3))).sum(dim=1)  # (B, C) -> (B,)
        return distance

    # Tensors made in inference mode can never take part in a backward pass, and validation may come first.
    @torch.inference_mode(mode=False)
    def _network(self, device: torch.device) -> nn.Module:
        self.setup()
        return self._networks[0].to(device)

    def _features(self, network: nn.Module, images: Tensor) -> list[Tensor]:
        """The five feature maps `(B, C, h, w)` of `images`."""
        shift, scale = network["statistics"]
        hidden, taps = (images.float() - shift) / scale, []  # (B, 1, H, W) -> (B, 3, H, W) by broadcasting
        for i, layer in enumerate(network["features"]):
            hidden = layer(hidden)
            if i in _TAPS:
                taps.append(hidden)
        return taps


class _Networks(LaidOut, nn.ModuleDict):
    """The networks of LPIPS."""


def _unit_length(features: Tensor) -> Tensor:
    """Scale the vector at each position to unit length: `(B, C, h, w)`, any dtype -> the same shape, float32."""
    features = features.float()
    return features / (features.square().sum(dim=1, keepdim=True) + 1e-8).sqrt()


def _linear_heads() -> nn.ParameterList:
    """The learned channel weights of each layer, `(C,)`, from the torchmetrics package."""
    with (files("torchmetrics") / "functional/image/lpips_models/vgg.pth").open("rb") as file:
        state = torch.load(file, map_location="cpu", weights_only=True)
    return nn.ParameterList(state[f"lin{i}.model.1.weight"].flatten() for i in range(len(_TAPS)))


def _vgg16_features(path: str | Path | None) -> nn.Sequential:
    """VGG16's convolutions up to relu5_3, with the weights of `path` or of torch's hub."""
    with torch.device("meta"):
        features = vgg16().features[: _TAPS[-1] + 1]
    state = _downloaded() if path is None else _read(path)
    state = {str(key).removeprefix("features."): value for key, value in state.items()}
    state = {key: value for key, value in state.items() if not key.startswith("classifier.")}
    try:
        features.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise UserError(
            f"model.loss.perceptual.weights={path}: not a state dict of torchvision's VGG16 (expected "
            f"vgg16-397923af.pth, or its features alone): it holds {', '.join(sorted(state)[:2])}, ..."
        ) from error
    return features.float()


def _read(path: str | Path) -> dict[str, Tensor]:
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except (*_READ_ERRORS, TypeError) as error:
        raise UserError(
            f"model.loss.perceptual.weights={path}: cannot be read as a state dict of VGG16 (expected torchvision's "
            f"vgg16-397923af.pth): {reason(Path(path), error)}"
        ) from error


def _downloaded() -> dict[str, Tensor]:
    weights = VGG16_Weights.IMAGENET1K_V1
    try:
        return weights.get_state_dict(progress=True, check_hash=True, weights_only=True, map_location="cpu")
    except _READ_ERRORS as error:
        raise UserError(
            f"LPIPS needs torchvision's VGG16, and {weights.url} cannot be had ({first_line(error)}): fetch the file "
            "elsewhere and set model.loss.perceptual.weights=/path/to/vgg16-397923af.pth"
        ) from error

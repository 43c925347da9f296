"""Features of the published DINOv2 ViT-L/14, whose Fréchet distance agrees with human judgement better than FID."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_lab.metrics.extractors import Extractor, had, rgb_8_bit
from ldm_lab.utils.reading import read_torch

URL = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth"
PATCH, GRID = 14, 37  # side of a patch in pixels; side of the grid of learned positions


class DINOv2(Extractor):
    """The class token of DINOv2 (Oquab et al. 2023); its Fréchet distance is FD-DINOv2 (Stein et al. 2023).

    The network is defined here, and the published weights are read as data, as `torch.hub` would download and execute
    code. Images are resized to 224 pixels as in torch-fidelity.

    Args:
        weights: the published file; None: from torch's hub cache, downloaded if missing.
        width: channels; 1024 is ViT-L.
        depth: number of blocks.
        heads: attention heads.

    Raises:
        UserError: torch-fidelity is not installed, or the weights are not available.
        LoadError: the file holds other weights.
    """

    name, distance = "dinov2-vit-l-14", "fd_dinov2"
    MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def __init__(self, weights: str | Path | None = None, width: int = 1024, depth: int = 24, heads: int = 16) -> None:
        super().__init__()
        self.dimension = width
        with torch.device("meta"):
            self.network = ViT(width, depth, heads)
        with had(URL, weights, "dinov2"):
            state = _downloaded() if weights is None else read_torch(Path(weights))
            state = {key: value for key, value in state.items() if key != "mask_token"}  # only for training
            self.network.load_state_dict(state, assign=True)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """`(B, 3, H, W)` or `(B, 1, H, W)`, uint8 or float32 in [-1, 1] -> `(B, width)`, float32."""
        from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x as resize

        images = rgb_8_bit(images).float()
        images = resize(images, size=(224, 224), align_corners=False) / 255  # (B, 3, 224, 224) in [0, 1]
        mean, std = (images.new_tensor(values)[:, None, None] for values in (self.MEAN, self.STD))
        return self.network((images - mean) / std)


def _downloaded() -> dict[str, Tensor]:
    return torch.hub.load_state_dict_from_url(URL, progress=False, map_location="cpu", weights_only=True)


class ViT(nn.Module):
    """A vision transformer with LayerScale, under the names of the published weights.

    Args:
        width: channels.
        depth: number of blocks.
        heads: attention heads.
    """

    def __init__(self, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + GRID**2, width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, PATCH, PATCH)})
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, images: Tensor) -> Tensor:
        """`(B, 3, H, W)`, sides multiples of 14 -> the class token `(B, width)`."""
        patches = self.patch_embed["proj"](images)  # (B, C, h, w)
        positions = self.positions(patches.shape[2:])
        tokens = torch.cat([self.cls_token.expand(len(images), -1, -1), patches.flatten(2).mT], dim=1) + positions
        for block in self.blocks:
            tokens = block(tokens)  # (B, 1 + h*w, C)
        return self.norm(tokens[:, 0])

    def positions(self, size: torch.Size) -> Tensor:
        """The learned position embeddings, resized to a grid of `size` as in the original: `(1, 1 + h*w, C)`."""
        first, grid = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        grid = grid.unflatten(1, (GRID, GRID)).permute(0, 3, 1, 2)  # (1, 37*37, C) -> (1, C, 37, 37)
        factor = tuple((side + 0.1) / GRID for side in size)  # the original's offset against rounding
        grid = F.interpolate(grid, scale_factor=factor, mode="bicubic")
        return torch.cat([first, grid.flatten(2).mT], dim=1)


class Block(nn.Module):
    """Attention and an MLP, each with pre-normalisation, LayerScale and a residual connection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})
        self.ls1, self.ls2 = (nn.ParameterDict({"gamma": torch.zeros(width)}) for _ in range(2))

    def forward(self, tokens: Tensor) -> Tensor:
        """`(B, N, C)` -> the same."""
        tokens = tokens + self.ls1["gamma"] * self.attention(self.norm1(tokens))
        hidden = F.gelu(self.mlp["fc1"](self.norm2(tokens)))
        return tokens + self.ls2["gamma"] * self.mlp["fc2"](hidden)

    def attention(self, tokens: Tensor) -> Tensor:
        """`(B, N, C)` -> the same."""
        parts = self.attn["qkv"](tokens).unflatten(2, (3, self.heads, -1))  # (B, N, 3, heads, c)
        query, key, value = parts.permute(2, 0, 3, 1, 4)  # (B, heads, N, c) each
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.attn["proj"](mixed.transpose(1, 2).flatten(2))

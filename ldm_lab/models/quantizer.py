"""Vector quantization (van den Oord et al. 2017, arXiv 1711.00937): replaces latents by their nearest codes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MOST_DISTANCES = 2**25  # maximum number of distances in memory: 128 MiB


class QuantizerInfo(NamedTuple):
    """The codes of a batch.

    Attributes:
        perplexity: exp of the entropy of the code frequencies in the batch (0-dim); n if all are used equally.
        min_encodings: always None, as in diffusers, as one-hot rows would take N x n entries.
        indices: code index of each latent, `(B*H*W,)`, int64.
    """

    perplexity: Tensor
    min_encodings: None
    indices: Tensor


class QuantizerOutput(NamedTuple):
    """Quantized latents `(B, C, H, W)`, the codebook and commitment loss (0-dim, float32), and the codes."""

    quantized: Tensor
    loss: Tensor
    info: QuantizerInfo


class VectorQuantizer(nn.Module):
    """A codebook of `n_e` vectors, with straight-through gradients.

    The loss is (van den Oord et al. 2017, equation 3, second and third term; sg stops the gradient, the mean
    is over all entries):

        legacy=True:   mean((z - sg e)^2) + beta mean((sg z - e)^2)    CompVis's training
        legacy=False:  beta mean((z - sg e)^2) + mean((sg z - e)^2)    the paper

    Both have the same value; with `legacy=True` the codes follow the latents slowly, else quickly.

    Args:
        n_e: number of codes.
        vq_embed_dim: length of a code; 3 or 4 in latent diffusion.
        beta: the smaller of the two weights.
        legacy: the term that `beta` weights, see above. Both attributes may be changed later.

    Attributes:
        gradient: gives the quantized latents their gradient, `(latents, codes) -> quantized`, all `(..., C)`:
            `straight_through`, or `rotation.rotate`.
    """

    gradient: Callable[[Tensor, Tensor], Tensor]

    def __init__(self, n_e: int, vq_embed_dim: int, beta: float = 0.25, legacy: bool = True) -> None:
        super().__init__()
        self.n_e = n_e
        self.vq_embed_dim = vq_embed_dim
        self.beta = beta
        self.legacy = legacy
        self.gradient = straight_through
        self.embedding = nn.Embedding(n_e, vq_embed_dim)
        nn.init.uniform_(self.embedding.weight, -1 / n_e, 1 / n_e)

    def forward(self, z: Tensor, table: Tensor | None = None) -> QuantizerOutput:
        """Quantize latents `(B, C, H, W)`. Distances and loss are float32 for any dtype of `z`.

        Args:
            z: the latents.
            table: the codes `(n_e, C)`, equal to `embedding.weight`, where they are computed from other parameters,
                which then get the gradient of the codes.
        """
        latents = z.float().permute(0, 2, 3, 1)  # (B, C, H, W) -> (B, H, W, C)
        indices = self.nearest(latents.flatten(0, 2))  # (B*H*W,)
        table = self.embedding.weight if table is None else table
        codes = F.embedding(indices, table).float().view(latents.shape)  # (B*H*W, C) -> (B, H, W, C)

        commitment = (latents - codes.detach()).square().mean()
        codebook = (latents.detach() - codes).square().mean()
        weights = (1.0, self.beta) if self.legacy else (self.beta, 1.0)
        loss = weights[0] * commitment + weights[1] * codebook

        quantized = self.gradient(latents, codes).permute(0, 3, 1, 2).to(z.dtype)  # (B, H, W, C) -> (B, C, H, W)
        info = QuantizerInfo(perplexity(code_counts(indices, self.n_e)), None, indices)
        return QuantizerOutput(quantized, loss, info)

    @torch.no_grad()
    def nearest(self, latents: Tensor) -> Tensor:
        """Index of the nearest code for each row: `(N, C) -> (N,)`.

        |z|^2 is the same for all codes, so |e|^2 - 2 z.e decides. It is summed channel by channel, in an
        n x n_e matrix for n rows at a time. A matrix product might run in TF32 or bf16, whose errors are as
        large as the distance between neighbouring codes.
        """
        codes = self.embedding.weight.float()
        squares = codes.square().sum(1)  # (n_e,)
        found = []
        for rows in latents.float().split(max(1, MOST_DISTANCES // self.n_e)):
            scores = squares.expand(len(rows), -1).clone()  # (n_e,) -> (n, n_e)
            for latent, code in zip(rows.unbind(1), codes.unbind(1), strict=True):
                scores.addcmul_(latent[:, None], code, value=-2)
            found.append(scores.argmin(1))
        return torch.cat(found)

    def get_codebook_entry(self, indices: Tensor, shape: Sequence[int] | None = None) -> Tensor:
        """The codes with these indices: `(..., C)`, or `(B, C, H, W)` if `shape` is `(B, H, W, C)`."""
        codes = self.embedding(indices)
        return codes if shape is None else codes.view(*shape).permute(0, 3, 1, 2)


def straight_through(latents: Tensor, codes: Tensor) -> Tensor:
    """The value of the codes with the gradient of the latents (van den Oord et al. 2017, section 3.2)."""
    return latents + (codes - latents).detach()


def code_counts(indices: Tensor, n: int) -> Tensor:
    """Number of occurrences of each of `n` codes in `indices` `(N,)`: `(n,)`, float32."""
    # bincount would make the host wait for the device to get the size of its result
    return torch.zeros(n, device=indices.device).index_add_(0, indices, torch.ones(len(indices), device=indices.device))


def perplexity(counts: Tensor) -> Tensor:
    """Exp of the entropy of non-negative `counts` `(n,)`, which are normalised first; 0-dim, from 1 to n."""
    return torch.special.entr(counts / counts.sum()).sum().exp()

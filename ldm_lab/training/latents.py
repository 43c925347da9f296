"""Shape and noise of the latents that a first stage makes of images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from ldm_lab import randomness
from ldm_lab.models.first_stage import FirstStage

Shape = tuple[int, int, int]


def latent_shape(autoencoder: FirstStage, image_size: Sequence[int]) -> Shape:
    """(height, width) of images -> (C, h, w) of their latents."""
    height, width = (side // autoencoder.downsample_factor for side in image_size)
    return autoencoder.embed_dim, height, width


def posterior_noise(
    autoencoder: FirstStage, seed: int, positions: Iterable[int], shape: Shape, stream: str = "posterior"
) -> Tensor | None:
    """Noise for drawing latents, `(B, *shape)` on the CPU; row i depends on (seed, stream, positions[i]) alone.

    None where latents are not drawn: what `FirstStage.latents` takes then.
    """
    return randomness.normal(seed, stream, positions, shape) if autoencoder.draws_latents else None

"""Shape, posterior noise and cache of the latents of a first stage."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from ldm_lab.checkpoints.checkpoint import fingerprint
from ldm_lab.data.datamodule import ImageDataModule
from ldm_lab.data.latents import LatentCache
from ldm_lab.data.shared_latents import SharedLatentCache
from ldm_lab.models.first_stage import FirstStage
from ldm_lab.utils import cache_folder, randomness
from ldm_lab.utils.urls import URL, is_url

Shape = tuple[int, int, int]
PRECISIONS = {"float32": "32-true", "bfloat16": "bfloat16"}  # `data.latents_precision` -> its name in a cache's key


def latent_shape(autoencoder: FirstStage, image_size: Sequence[int]) -> Shape:
    """(height, width) of images -> (C, h, w) of their latents."""
    height, width = (side // autoencoder.downsample_factor for side in image_size)
    return autoencoder.embed_dim, height, width


def moments_shape(autoencoder: FirstStage, image_size: Sequence[int]) -> Shape:
    """(height, width) of images -> (M, h, w) of their `FirstStage.moments`."""
    channels, height, width = latent_shape(autoencoder, image_size)
    return channels * (2 if autoencoder.draws_latents else 1), height, width


def are_cached(stage: str, data: ImageDataModule) -> bool:
    """Whether a stage trains on cached latents: stage 2 with `data.latents=cached`."""
    return stage == "diffusion" and data.latents == "cached"


def latent_cache(autoencoder: FirstStage, data: ImageDataModule) -> LatentCache:
    """The latent cache of a data module's training images.

    Args:
        autoencoder: encodes the images.
        data: holds the images, the precision of encoding, and the folder of caches.
    """
    config = {key: value for key, value in autoencoder.config.items() if key not in ("scaling_factor", "sample_size")}
    what = {
        "autoencoder": {"class": autoencoder.class_name(), "weights": fingerprint(autoencoder), "config": config},
        "images": {"class": type(data.train_set).__name__, "fingerprint": data.train_set.fingerprint()},
        "transform": data.train_set.transform(),
        "precision": PRECISIONS[data.latents_precision],
    }
    shape = (2 if data.train_set.flip else 1, *moments_shape(autoencoder, data.image_size))
    arguments = cache_folder.local(data.cache_dir) / "latents", what, data.num_train, shape, data.latents_dtype
    return SharedLatentCache(URL(data.cache_dir), *arguments) if is_url(data.cache_dir) else LatentCache(*arguments)


def posterior_noise(
    autoencoder: FirstStage, seed: int, positions: Iterable[int], shape: Shape, stream: str = "posterior"
) -> Tensor | None:
    """Noise for drawing latents, `(B, *shape)` on the CPU; row i depends only on (seed, stream, positions[i]).

    None for a first stage that does not draw its latents; `FirstStage.latents` takes None then.
    """
    return randomness.normal(seed, stream, positions, shape) if autoencoder.draws_latents else None

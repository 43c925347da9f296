"""Encodes the training images before stage 2 begins, into a cache that all runs share."""

from __future__ import annotations

import contextlib
import itertools
import math
import shutil
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence

import torch
from lightning import Callback, Trainer
from torch import Tensor
from tqdm import tqdm

from ldm_lab.data.datamodule import ImageDataModule
from ldm_lab.data.dataset import spread
from ldm_lab.data.latents import DTYPES, UNKNOWN, CachedLatents, Error, LatentCache, Shard, relative_rms
from ldm_lab.data.loading import Loader
from ldm_lab.metrics.extractors import exactly
from ldm_lab.models.first_stage import FirstStage
from ldm_lab.models.vq_model import VQModel
from ldm_lab.training.latents import are_cached, latent_cache
from ldm_lab.training.loggers.run_logger import RunLogger, run_loggers
from ldm_lab.training.planning.memory import readable
from ldm_lab.training.stage_module import StageModule
from ldm_lab.utils.errors import UserError
from ldm_lab.utils.writing import require_writable

WAIT = 0.5  # seconds between two checks of the shards that other processes encode
Claims = deque[tuple[int, contextlib.ExitStack]]  # claimed shards; closing the stack releases


class Encode(Callback):
    """Gives stage 2 its training images as latents, with `data.latents=cached`.

    All ranks, and all other runs at the same time, encode the missing shards of the cache. Each process goes on once
    the cache is complete. Batches have the validation batch size. The precision is `data.latents_precision`, not the
    trainer's, as many runs use the same cache.
    """

    def on_fit_start(self, trainer: Trainer, module: StageModule) -> None:
        """Encode the missing shards, then let stage 2 train on the cache.

        Raises:
            UserError: the disk has no room, a number does not fit the dtype, or an image cannot be decoded.
            LoadError: the cache is damaged.
        """
        data = trainer.datamodule
        if not are_cached(module.stage, data):
            return
        cache = latent_cache(module.autoencoder, data)
        encode = Encoder(module.autoencoder, cache, data.latents_precision)
        check_room(cache)
        cache.open_folder()
        if trainer.local_rank == 0:
            cache.share()
        missing = new = cache.missing()
        with Bar(cache, missing, shown=trainer.is_global_zero and bool(missing)) as bar:
            while missing := cache.missing():
                order = cache.order(missing, trainer.global_rank / trainer.world_size)
                if not encode_free(cache, order, data, encode, bar) and cache.missing():
                    time.sleep(WAIT)
                bar.update()
        data.cached = CachedLatents(cache, data.train_set)
        shards = [data.cached.shard(number) for number in cache.shards]  # opening checks every shard
        if trainer.is_global_zero:
            tqdm.write(f"{rounding(cache, shards, data.latents_precision)}: {cache.folder}")
        for logger in run_loggers(trainer):
            tell(logger, cache, bool(new))


def tell(logger: RunLogger, cache: LatentCache, new: bool) -> None:
    """Log the latent cache as an artifact: as an output if this run encoded any of it, else as an input."""
    if new:
        logger.log_artifact("latents", cache.key, folder=str(cache.folder), **cache.meta)
    else:
        logger.use_artifact("latents", cache.key)


def check_room(cache: LatentCache) -> None:
    """Raises `UserError` if the disk has no room for the missing latents, or the folder is not writable."""
    needed = cache.num_bytes(sum(len(cache.indices(shard)) for shard in cache.missing()))
    if needed:
        require_writable(cache.folder, "paths.cache=")
    folder = next(path for path in cache.folder.absolute().parents if path.exists())
    if needed > (free := shutil.disk_usage(folder).free):
        raise UserError(
            f"paths.cache={cache.folder.parents[1]}: {readable(free)} are free, and the latents need"
            f" {readable(needed)}: choose another place, or data.latents=online;"
            " python -m ldm_lab cache shows what is kept"
        )


def rounding(cache: LatentCache, shards: Sequence[Shard], precision: str) -> str:
    """A sentence on the error of cached latents against latents encoded in float32."""
    errors = [shard.error for shard in shards if not math.isnan(shard.error.relative_rms)]
    if not errors:
        return f"{cache.dtype} rounds the latents by {max(shard.rounding for shard in shards):.2g} (relative RMS)"
    rms = (sum(error.relative_rms**2 for error in errors) / len(errors)) ** 0.5
    codes = sum(error.codes for error in errors) / len(errors)  # NaN without a codebook
    change = "" if math.isnan(codes) else f", {codes:.2%} of the codes change"
    return f"encoding in {precision}, kept in {cache.dtype}, rounds the latents by {rms:.2g} (relative RMS){change}"


class Encoder:
    """Images `(B, 3, H, W)` -> moments `(B, views, M, h, w)`, float32, on the CPU.

    Args:
        autoencoder: the first stage.
        cache: the cache that the moments are written to.
        precision: "float32" (full precision, no TF32) or "bfloat16" (autocast).
    """

    MEASURED = 4  # shards; the first batch of each is encoded in bfloat16 and in float32 to compare

    def __init__(self, autoencoder: FirstStage, cache: LatentCache, precision: str) -> None:
        self.autoencoder, self.cache, self.precision = autoencoder, cache, precision
        self.measured = set() if precision == "float32" else set(spread(self.MEASURED, len(cache.shards)))

    def __call__(self, images: Tensor) -> Tensor:
        """Encode a batch."""
        return self._encode(images, self.precision)

    def error(self, images: Tensor, moments: Tensor) -> Error:
        """Error of the moments as the cache stores them, against moments encoded in float32."""
        exact = self._encode(images, "float32")
        kept = moments.to(DTYPES[self.cache.dtype]).float()
        error = Error(relative_rms(kept, exact))
        if not isinstance(self.autoencoder, VQModel):
            return error
        return error._replace(codes=(self._codes(kept) != self._codes(exact)).float().mean().item())

    def _encode(self, images: Tensor, precision: str) -> Tensor:
        autoencoder = self.autoencoder
        images = images.to(autoencoder.device, autoencoder.dtype)
        views = (images, images.flip(-1))[: self.cache.shape[0]]
        lower = torch.autocast(autoencoder.device.type, torch.bfloat16, enabled=precision == "bfloat16")
        with exactly(autoencoder.device), lower:
            moments = [autoencoder.moments(view).float() for view in views]
        return torch.stack(moments, dim=1).cpu()

    def _codes(self, moments: Tensor) -> Tensor:
        latents = moments.flatten(0, 1).to(self.autoencoder.device)  # (B, views, C, h, w) -> (B * views, C, h, w)
        with exactly(latents.device):
            return self.autoencoder.quantize(latents).info.indices


def encode_free(cache: LatentCache, shards: list[int], data: ImageDataModule, encode: Encoder, bar: Bar) -> bool:
    """Encode the shards that no other process has claimed; returns whether there were any."""
    claims: Claims = deque()
    batches = claimed_batches(cache, shards, data.val_size(data.trainer.world_size), claims)
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: [release.close() for _, release in claims])
        if (first := next(batches, None)) is None:
            return False
        parts: list[Tensor] = []
        skipped: dict[int, str] = {}
        error = UNKNOWN
        for batch in Loader(data.train_set, batch_sampler=itertools.chain([first], batches), **data.loading()):
            parts.append(encode(batch["image"]))
            if len(parts) == 1 and claims[0][0] in encode.measured:
                error = encode.error(batch["image"], parts[0])
            errors = zip(batch["position"].tolist(), batch.get("skipped", ()), strict=False)
            skipped |= {index: lines for index, lines in errors if lines}
            bar.update(sum(map(len, parts)))
            if sum(map(len, parts)) == len(cache.indices(claims[0][0])):
                cache.write(claims[0][0], torch.cat(parts), skipped, error)
                claims.popleft()[1].close()
                parts, skipped, error = [], {}, UNKNOWN
    return True


def claimed_batches(cache: LatentCache, shards: list[int], batch_size: int, claims: Claims) -> Iterator[list[int]]:
    """Yields batches of image indices of the shards that this process can claim, and adds each claim to `claims`.

    The loader prefetches, so a process holds two claims for a while.
    """
    for shard in shards:
        claim = contextlib.ExitStack()
        if not claim.enter_context(cache.claim(shard)):
            claim.close()
            continue
        claims.append((shard, claim))
        indices = list(cache.indices(shard))
        yield from (indices[first : first + batch_size] for first in range(0, len(indices), batch_size))


class Bar:
    """Progress bar of the images in the cache, whichever process encodes them.

    Args:
        cache: the cache that is being filled.
        missing: shards that are missing now.
        shown: whether this process shows the bar.
    """

    def __init__(self, cache: LatentCache, missing: list[int], shown: bool) -> None:
        self.cache, self.shown = cache, shown
        self._bar = tqdm(
            desc="encoding", total=cache.count, initial=self._there(missing), unit="img", unit_scale=True,
            disable=not shown, mininterval=0.5 if sys.stderr.isatty() else 30, dynamic_ncols=True,
        )  # fmt: skip

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def update(self, begun: int = 0) -> None:
        """Show the images of complete shards plus `begun` images of the current shard."""
        if self.shown:
            self._bar.update(max(0, self._there(self.cache.missing()) + begun - self._bar.n))

    def _there(self, missing: list[int]) -> int:
        return self.cache.count - sum(len(self.cache.indices(shard)) for shard in missing)

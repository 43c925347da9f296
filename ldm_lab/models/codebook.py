"""Keeps the codes of a codebook in use during training; not part of the trained network."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ldm_lab.models.quantizer import VectorQuantizer, code_counts, perplexity
from ldm_lab.utils.arguments import require_positive
from ldm_lab.utils.limits import Count, Whole
from ldm_lab.utils.randomness import generator
from ldm_lab.utils.reading import MAX_CODES
from ldm_lab.utils.transfer import to_device

JITTER = 0.01  # in standard deviations of the latents


class CodebookUsage(nn.Module):
    """Initialises a codebook from latents, tracks the usage of each code, and replaces unused codes.

    A code that is nearest to no latent gets no gradient and stays unused forever. So at `init_step` the codebook
    is replaced once by latents drawn from the batch. Later, a code whose share of the latents falls below
    `threshold` times the mean share becomes a latent of the current batch (as in Dhariwal et al. 2020, arXiv
    2005.00341, section 3.1), and its usage is set to the mean, so that it has time to adapt.

    With `torch.distributed` initialised, counts are summed and latents gathered over all ranks, and every rank
    makes the same choice, so equal codebooks stay equal. After initialisation the host never waits for the
    device.

    Args:
        num_codes: number of codes of the quantizer.
        init_step: the first update at or after this step draws the codebook from its batch; use a few steps,
            so that the encoder has left its random initialisation. None keeps the codebook (for trained
            weights).
        decay: decay of the moving average of usage; an unused code is replaced after about
            log(threshold) / log(decay) steps.
        threshold: a code with less than this share, relative to the mean share 1/n, is replaced.
        max_replaced: maximum number of codes replaced in one step.
        until_step: no code is replaced from this step on, so that training can converge; None: no limit.

    Attributes:
        usage: moving average of each code's share of the latents, `(num_codes,)`; saved in the state dict.
        initialised: whether the codebook has been drawn, 0-dim; saved in the state dict.
    """

    usage: Tensor
    initialised: Tensor

    def __init__(
        self,
        num_codes: Count,
        init_step: Whole | None = 0,
        decay: float = 0.97,
        threshold: float = 0.1,
        max_replaced: Whole = 64,
        until_step: Whole | None = None,
    ) -> None:
        super().__init__()
        require_positive(MAX_CODES, num_codes=num_codes)
        self.num_codes = num_codes
        self.init_step = init_step
        self.decay = decay
        self.threshold = threshold
        self.max_replaced = min(max_replaced, num_codes)
        self.until_step = until_step
        self.register_buffer("usage", torch.full((num_codes,), 1 / num_codes))
        self.register_buffer("initialised", torch.tensor(init_step is None))
        self._known_initialised = False  # avoids further reads from the device once true

    @property
    def used_fraction(self) -> Tensor:
        """Fraction of the codes whose share is above the threshold; 0-dim."""
        return (self.usage >= self.threshold / self.num_codes).float().mean()

    @property
    def perplexity(self) -> Tensor:
        """Exp of the entropy of the shares: `num_codes` if all codes are used equally; 0-dim."""
        return perplexity(self.usage)

    @torch.no_grad()
    def update(self, quantizer: VectorQuantizer, latents: Tensor, indices: Tensor, step: int, seed: int) -> None:
        """Update the usage from one batch, and change `quantizer.embedding.weight` in place if needed.

        Every rank must call it once after each optimizer step.

        Args:
            quantizer: the quantizer.
            latents: its input, `(B, C, H, W)`; B may differ between ranks.
            indices: its chosen codes, `(B*H*W,)` or `(B, H, W)`.
            step: number of the step, the same on all ranks.
            seed: seed of the run, the same on all ranks.
        """
        counts = _sum_over_ranks(code_counts(indices.flatten(), self.num_codes))
        self.usage.lerp_(counts / counts.sum(), 1 - self.decay)
        rows = latents.detach().float().permute(0, 2, 3, 1).flatten(0, 2)  # (B, C, H, W) -> (B*H*W, C)
        codebook = quantizer.embedding.weight
        if not self._is_initialised():
            if step >= self.init_step:
                codebook.copy_(draw_latents(rows, self.num_codes, step, seed))
                self.usage.fill_(1 / self.num_codes)
                self.initialised.fill_(True)
        elif self.until_step is None or step < self.until_step:
            self._replace_unused(codebook, draw_latents(rows, self.max_replaced, step, seed))

    def _is_initialised(self) -> bool:
        self._known_initialised = self._known_initialised or bool(self.initialised)
        return self._known_initialised

    def _replace_unused(self, codebook: Tensor, latents: Tensor) -> None:
        """Replace the least used codes below the threshold, at most as many as there are `latents`."""
        codes = self.usage.argsort(stable=True)[: len(latents)]
        share = self.usage[codes]
        unused = share < self.threshold / self.num_codes
        # `where` instead of indexing, as a size that depends on values would make the host wait.
        codebook[codes] = torch.where(unused[:, None], latents.to(codebook.dtype), codebook[codes])
        self.usage[codes] = torch.where(unused, 1 / self.num_codes, share)


def draw_latents(rows: Tensor, count: int, step: int, seed: int) -> Tensor:
    """`count` random rows of the latents `(N, C)` of all ranks, the same on every rank: `(count, C)`.

    Every rank gives an equal part. A rank with too few rows repeats rows, and jitter separates the copies.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if _is_distributed() else (0, 1)
    random = generator(seed, "codebook", step, rank)
    part = -(-count // world_size)  # rounded up
    order = torch.randperm(len(rows), generator=random)[torch.arange(part) % len(rows)]
    drawn = rows[to_device(order, rows.device)]
    if part > len(rows):
        noise = to_device(torch.randn(drawn.shape, generator=random), drawn.device)
        drawn = drawn + JITTER * rows.std(0, unbiased=False) * noise
    return _gather_over_ranks(drawn)[:count]


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _sum_over_ranks(values: Tensor) -> Tensor:
    if _is_distributed():
        dist.all_reduce(values)
    return values


def _gather_over_ranks(rows: Tensor) -> Tensor:
    """`(N, C)` on each of R ranks -> `(R*N, C)`, the same on all."""
    if not _is_distributed():
        return rows
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)

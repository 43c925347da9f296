"""What keeps the codes of a codebook alive during training; none of it belongs to the trained network."""

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

JITTER = 0.01  # standard deviations of the latents


class CodebookUsage(nn.Module):
    """Starts a codebook from latents, follows how often each code is used, and re-uses those that are not.

    A code that no latent is nearest to gets no gradient and stays unused for ever. So the codebook is
    replaced once, at `init_step`, by latents drawn from the batch, and whenever a code's share of the latents
    falls under `threshold` of the mean share, it becomes a latent of the current batch (as in Dhariwal et al.
    2020, arXiv 2005.00341, section 3.1) and counts as used averagely, so that it has time to find its place.

    With `torch.distributed` initialised, counts are summed and latents gathered over all ranks, and every rank
    makes the same choice: equal codebooks stay equal. After the start nothing here makes the host wait for the
    device.

    Args:
        num_codes: codes of the quantizer.
        init_step: the first update at this step or a later one draws the codebook from its batch: a few steps
            into training, when the encoder has left its random start. None keeps the codebook (for weights
            that were trained before).
        decay: of the moving average of usage; a code that is never used is noticed after about
            log(threshold) / log(decay) steps.
        threshold: share of the latents, relative to the mean share 1/n, under which a code is re-used.
        max_replaced: at most so many codes are re-used in one step.
        until_step: from this step on no code is re-used, so that training can converge; None means never.

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
        self._known_initialised = False  # spares asking the device again once it said yes

    @property
    def used_fraction(self) -> Tensor:
        """Fraction of the codes whose share lies above the threshold; 0-dim."""
        return (self.usage >= self.threshold / self.num_codes).float().mean()

    @property
    def perplexity(self) -> Tensor:
        """Exp of the entropy of the shares: `num_codes` if all codes are used alike; 0-dim."""
        return perplexity(self.usage)

    @torch.no_grad()
    def update(self, quantizer: VectorQuantizer, latents: Tensor, indices: Tensor, step: int, seed: int) -> None:
        """Take note of one batch and change `quantizer.embedding.weight` in place where needed.

        To be called by every rank, once for each optimizer step, after it.

        Args:
            quantizer: the quantizer that was used.
            latents: what it quantized, `(B, C, H, W)`; B may differ between the ranks.
            indices: the codes it chose, `(B*H*W,)` or `(B, H, W)`.
            step: number of the step, alike on all ranks.
            seed: seed of the run, alike on all ranks.
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
        """Of the least used codes, overwrite those under the threshold: as many as there are `latents`, at most."""
        codes = self.usage.argsort(stable=True)[: len(latents)]
        share = self.usage[codes]
        unused = share < self.threshold / self.num_codes
        # Chosen by `where` and not by indexing: a size that depends on values would make the host wait.
        codebook[codes] = torch.where(unused[:, None], latents.to(codebook.dtype), codebook[codes])
        self.usage[codes] = torch.where(unused, 1 / self.num_codes, share)


def draw_latents(rows: Tensor, count: int, step: int, seed: int) -> Tensor:
    """`count` random rows of the latents `(N, C)` of all ranks, the same on every rank: `(count, C)`.

    Every rank gives its part. Where it has fewer rows than that, rows are repeated, and jitter parts the copies.
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

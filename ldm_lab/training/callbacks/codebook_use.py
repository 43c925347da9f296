"""Logs codebook usage and warns of codebook collapse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool1d
from tqdm import tqdm

from ldm_lab.models.quantizer import code_counts, perplexity
from ldm_lab.training.autoencoder_module import AutoencoderModule, FirstStageModule
from ldm_lab.training.callbacks.episode import Episode
from ldm_lab.training.callbacks.pictures import show_rgb
from ldm_lab.utils.limits import Count, NonNegative

HEIGHT, DECADES = 128, 2  # height of the histogram in pixels; powers of ten above and below its middle
BAR, MIDDLE = (-0.45, 0.0, 0.4), (-0.2, -0.2, -0.2)  # red, green, blue in [-1, 1]


class CodebookUse(Callback):
    """Logs codebook usage over the whole held-out set: `codebook/used_fraction` and `codebook/perplexity`.

    Also logs the picture `codebook` (see `histogram`).

    Perplexity is exp(entropy) of the code frequencies: the number of equally frequent codes with the same entropy. If
    the perplexity stays low, the codebook has collapsed. The callback warns once per collapse and logs
    `collapse/codebook`: 1 while the collapse lasts, else 0. An autoencoder without a codebook logs nothing.

    Args:
        folder: `samples/` of the stage.
        collapsed_below: the codebook has collapsed below this perplexity, as a fraction of all codes; at least 2 codes.
        patience: validations in a row, once codes are initialised; a collapse ends at twice that perplexity.
        bars: maximum number of bars in the histogram; each shows the mean of a group of codes.
    """

    def __init__(
        self, folder: str, collapsed_below: NonNegative = 0.01, patience: Count = 3, bars: Count = 256
    ) -> None:
        self.folder, self.collapsed_below, self.bars = Path(folder), collapsed_below, bars
        self.episode = Episode(patience)

    def state_dict(self) -> dict[str, Any]:
        """State of the collapse detector."""
        return self.episode.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the collapse detector."""
        self.episode.load_state_dict(state)

    def on_validation_start(self, trainer: Trainer, module: FirstStageModule) -> None:
        """Reset the counts and hook into the quantizer."""
        self._hooks = []
        if isinstance(module, AutoencoderModule):
            self._counts = torch.zeros(module.autoencoder.config.num_vq_embeddings, device=module.device)
            self._hooks.append(module.autoencoder.quantize.register_forward_hook(self._count))

    def _count(self, quantizer: object, inputs: tuple, output: Any) -> None:  # noqa: ANN401
        self._counts += code_counts(output.info.indices, len(self._counts))

    def on_validation_end(self, trainer: Trainer, module: FirstStageModule) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()

    def on_validation_epoch_end(self, trainer: Trainer, module: FirstStageModule) -> None:
        """Sum the counts over ranks and log."""
        if not self._hooks:
            return
        counts = trainer.strategy.reduce(self._counts, reduce_op="sum")
        module.log("codebook/used_fraction", (counts > 0).float().mean(), batch_size=1, sync_dist=True)
        module.log("codebook/perplexity", perplexity(counts), batch_size=1, sync_dist=True)
        show_rgb(trainer, module, self.folder, "codebook", histogram(counts, self.bars)[None])
        if module.codebook.initialised:
            self._judge(trainer, module, float(perplexity(counts)))

    def _judge(self, trainer: Trainer, module: AutoencoderModule, found: float) -> None:
        codes = len(self._counts)
        limit = max(2.0, self.collapsed_below * codes)
        begins = self.episode.note(module.images_seen, bad=found < limit, good=found > 2 * limit)
        if begins and trainer.is_global_zero:
            tqdm.write(
                f"warning: the codebook has collapsed: its perplexity is {found:.1f} of {codes:,} codes, since"
                f" {self.episode.since:,} images. Images are rounded to almost nothing. Lower model.optimizer.lr, or"
                " let the codes follow the latents faster (model.legacy_codebook_loss=false), under another name="
            )
        module.log("collapse/codebook", float(self.episode.on), batch_size=1, sync_dist=True)


def histogram(counts: Tensor, bars: int) -> Tensor:
    """Bar chart of code usage, from the most used code to the least used.

    The log scale is fixed: a code of mean frequency reaches the grey line in the middle, a code of a hundred times the
    mean frequency reaches the top, and an unused code has no bar.

    Args:
        counts: how often each code was used, `(n,)`, not all 0.
        bars: maximum number of bars; with more codes, each bar shows the mean of a group of codes.

    Returns:
        `(3, H, W)` in [-1, 1].
    """
    ordered = counts.float().sort(descending=True).values[None]  # (1, n)
    uses = adaptive_avg_pool1d(ordered, min(bars, len(counts)))[0] / counts.float().mean()  # (bars,)
    heights = HEIGHT * (uses.log10() / DECADES + 1) / 2
    heights = heights.repeat_interleave(max(1, 2 * HEIGHT // len(uses)))  # (W,)
    covered = torch.arange(HEIGHT, 0, -1, device=heights.device)[:, None] <= heights  # (H, W), the top row first
    bar, middle = (torch.tensor(colour, device=heights.device) for colour in (BAR, MIDDLE))
    picture = torch.where(covered, bar[:, None, None], 1.0)  # (3, H, W)
    picture[:, HEIGHT // 2] = middle[:, None]
    return picture

"""How much of the codebook is alive."""

from __future__ import annotations

from typing import Any

import torch
from lightning import Callback, Trainer

from ldm_lab.models.quantizer import code_counts, perplexity
from ldm_lab.training.autoencoder_module import AutoencoderModule, FirstStageModule


class CodebookUse(Callback):
    """Logs, over the whole held-out set, which codes are used: `codebook/used_fraction` and `codebook/perplexity`.

    Perplexity is exp(entropy) of the codes' frequencies: the number of codes that would be used as
    evenly as possible to the same effect. An autoencoder without a codebook has nothing to log.
    """

    def on_validation_start(self, trainer: Trainer, module: FirstStageModule) -> None:
        """Count from zero."""
        self._hooks = []
        if isinstance(module, AutoencoderModule):
            self._counts = torch.zeros(module.autoencoder.config.num_vq_embeddings, device=module.device)
            self._hooks.append(module.autoencoder.quantize.register_forward_hook(self._count))

    def _count(self, quantizer: object, inputs: tuple, output: Any) -> None:  # noqa: ANN401
        self._counts += code_counts(output.info.indices, len(self._counts))

    def on_validation_end(self, trainer: Trainer, module: FirstStageModule) -> None:
        """Stop counting."""
        for hook in self._hooks:
            hook.remove()

    def on_validation_epoch_end(self, trainer: Trainer, module: FirstStageModule) -> None:
        """Add the ranks' counts up and log."""
        if not self._hooks:
            return
        counts = trainer.strategy.reduce(self._counts, reduce_op="sum")
        module.log("codebook/used_fraction", (counts > 0).float().mean(), batch_size=1, sync_dist=True)
        module.log("codebook/perplexity", perplexity(counts), batch_size=1, sync_dist=True)

"""Warns when the discriminator has collapsed."""

from __future__ import annotations

from typing import Any

import torch
from lightning import Callback, Trainer
from tqdm import tqdm

from ldm_lab.training.autoencoder_module import FirstStageModule
from ldm_lab.training.callbacks.episode import Episode
from ldm_lab.utils.limits import Count, NonNegative
from ldm_lab.utils.transfer import to_device

TERMS = ("discriminator", "logits_real", "logits_fake")


class DiscriminatorHealth(Callback):
    """Warns when the discriminator has collapsed; `collapse/discriminator` is 1 while the collapse lasts, else 0.

    The callback averages the discriminator's loss and logits over the steps between two validations. The discriminator
    *wins* if its hinge loss, and so its gradient, is nearly 0. It is *blind* if real images and reconstructions get the
    same logits. In good training the loss is between about 0.3 and 1, and the logits differ. Without a discriminator,
    or before the discriminator starts, there is nothing to log.

    Args:
        loss_below: the discriminator wins below this mean hinge loss.
        gap_below: the discriminator is blind if the mean logits differ by less.
        patience: validations in a row; a collapse ends when loss and difference are twice these limits.
    """

    def __init__(self, loss_below: NonNegative = 0.01, gap_below: NonNegative = 1e-3, patience: Count = 3) -> None:
        self.loss_below, self.gap_below = loss_below, gap_below
        self.episode = Episode(patience)
        self._sums, self._steps = torch.zeros(len(TERMS)), 0

    def state_dict(self) -> dict[str, Any]:
        """State of the collapse detector, and the running sums."""
        return {"episode": self.episode.state_dict(), "sums": self._sums, "steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the collapse detector and the running sums."""
        if self.episode.load_state_dict(state["episode"]):
            self._sums, self._steps = state["sums"], state["steps"]

    def on_train_batch_end(self, trainer: Trainer, module: FirstStageModule, *_: object) -> None:
        """Add this step's terms to the sums, on the device."""
        size = trainer.datamodule.global_batch_size
        whole = module.images_seen % size == 0
        if not whole or module.loss.discriminator is None or module.step_left_out:
            return
        if module.loss.adversarial.discriminator_factor(module.images_seen - size):
            self._sums = to_device(self._sums, module.device) + torch.stack([module.terms[name] for name in TERMS])
            self._steps += 1

    def on_validation_epoch_end(self, trainer: Trainer, module: FirstStageModule) -> None:
        """Check for a collapse and log; only rank 0 prints the warning."""
        if not self._steps:
            return
        loss, real, fake = trainer.strategy.broadcast(self._sums / self._steps).tolist()
        self._sums, self._steps = torch.zeros(len(TERMS)), 0
        bad = loss < self.loss_below or abs(real - fake) < self.gap_below
        good = loss > 2 * self.loss_below and abs(real - fake) > 2 * self.gap_below
        if self.episode.note(module.images_seen, bad, good) and trainer.is_global_zero:
            tqdm.write(f"warning: {self._line(loss, real, fake)}")
        module.log("collapse/discriminator", float(self.episode.on), batch_size=1, sync_dist=True)

    def _line(self, loss: float, real: float, fake: float) -> str:
        what = "wins: its loss" if loss < self.loss_below else "is blind: its loss"
        return (
            f"the discriminator {what} is {loss:.2g}, its mean logits {real:.3g} for images and {fake:.3g} for"
            f" reconstructions, since {self.episode.since:,} images. The reconstructions learn nothing from it any"
            " more. Lower model.optimizer.lr, let it begin later (model.loss.adversarial.start_images) or make it"
            " smaller (model.loss.discriminator.channels), under another name="
        )

"""Averages of a network with power-function profiles, from which any length can be made after training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from ldm_lab.training.ema import frozen_copy, move
from ldm_lab.utils import power_profiles
from ldm_lab.utils.errors import UserError


class PowerEMA(nn.Module):
    """Frozen float32 averages of a network: θ̄ ← beta(t) θ̄ + (1 - beta(t)) θ, beta(t) = (1 - 1/t)^(gamma + 1).

    Karras et al. 2024, arXiv 2312.02696, section 3.1. Validation and previews do not use them. The host never waits for
    the device, as t follows from the images seen. For the combination of stored averages see `checkpoints.averages`.

    Attributes:
        averages: an averaged network for each length; named after the length, so that a checkpoint of other lengths
            does not load.

    Args:
        network: the network to average; it is not changed.
        lengths: sigma_rel of each average, above 0 and below 0.289.
    """

    def __init__(self, network: nn.Module, lengths: Sequence[float] = (0.05, 0.10)) -> None:
        super().__init__()
        key = f"model.power_ema={list(lengths)}"
        for length in lengths:
            power_profiles.check(length, key)
        if not lengths or len(set(lengths)) < len(lengths):
            raise UserError(f"{key}: give different lengths, such as [0.05,0.1], or null")
        self.lengths = list(lengths)
        self.gammas = [power_profiles.gamma(length) for length in lengths]
        names = [str(length).replace(".", "_") for length in lengths]
        self.averages = nn.ModuleDict({name: frozen_copy(network) for name in names})

    def update(self, network: nn.Module, images_seen: int, batch_size: int) -> None:
        """Move the averages towards the weights of `network`; call once per optimizer step.

        Args:
            network: the followed network.
            images_seen: training images so far, with those of this step.
            batch_size: images of this step, over all devices.

        Raises:
            UserError: `network` has other parameters or buffers than the averaged network.
        """
        for gamma, average in zip(self.gammas, self.averages.values(), strict=True):
            move(average, network, power_profiles.beta(gamma, images_seen, batch_size))

    def save(self, folder: Path) -> None:
        """Write each average as `<folder>/<length>/`, the folder of a network."""
        for length, average in zip(self.lengths, self.averages.values(), strict=True):
            average.save_pretrained(folder / str(length))

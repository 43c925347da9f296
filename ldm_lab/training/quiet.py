"""Silences Lightning's general advice; its messages about errors stay."""

from __future__ import annotations

import logging
import warnings

# Each of these is on purpose here, or useless to the reader.
_EXPECTED = (
    r".*isinstance\(treespec, LeafSpec\).*",  # inside Lightning
    r".*module\(s\) in eval mode at the start of training.*",  # the frozen first stage and the average
    r".*recommended to use `self\.log\('(images_seen|eval/\w+)', .*",  # these values are the same on all ranks
    r".*have overridden `(on_before_batch_transfer|transfer_batch_to_device)`.*",
    r".*does not have many workers.*",  # data.num_workers is the user's choice
    r".*DataLoader will create \d+ worker processes.*",  # the same
    r".*predict returned None.*",  # the samples are files
    r".*length of `(DataLoader|CombinedLoader)` across ranks is zero.*",  # the run has all its samples already
)


def quiet() -> None:
    """Install the filters; call once before making a trainer."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in _EXPECTED:
        warnings.filterwarnings("ignore", message=message)

"""Lightning's door to `ldm_lab.checkpoint`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch.plugins.io import TorchCheckpointIO

from ldm_lab import checkpoint


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes whole files or none, reads without running anything they hold."""

    def save_checkpoint(self, checkpoint_state: dict[str, Any], path: str | Path, storage_options: object = None) -> None:
        """See `ldm_lab.checkpoint.save`."""
        checkpoint.save(checkpoint_state, path)

    def load_checkpoint(self, path: str | Path, map_location: object = None, weights_only: bool | None = None) -> dict:
        """See `ldm_lab.checkpoint.load`."""
        return checkpoint.load(path)

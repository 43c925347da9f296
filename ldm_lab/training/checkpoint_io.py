"""Lightning's door to `ldm_lab.checkpoint`, and files that have two names."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from lightning.pytorch.plugins.io import TorchCheckpointIO

from ldm_lab import checkpoint


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes whole files or none, reads without running anything they hold."""

    def save_checkpoint(
        self, checkpoint_state: dict[str, Any], path: str | Path, storage_options: object = None
    ) -> None:
        """See `ldm_lab.checkpoint.save`."""
        checkpoint.save(checkpoint_state, path)

    def load_checkpoint(self, path: str | Path, map_location: object = None, weights_only: bool | None = None) -> dict:
        """See `ldm_lab.checkpoint.load`."""
        return checkpoint.load(path)


def place(source: Path, target: Path) -> None:
    """Give the file `source` a second name, at once: by a hard link where the disk has them, else as a copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
    os.replace(temporary, target)
    temporary.unlink(missing_ok=True)  # it stays where both were names of one file

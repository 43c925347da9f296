"""Callbacks of trainings on a cluster."""

import time
from pathlib import Path

from lightning import Callback

from ldm_lab.training.callbacks.interrupt import Interrupt


class Hold(Callback):
    """At certain images of a stage the first rank tells so, and waits: once each.

    It waits for a signal, for its end, or for a file `go`.

    Args:
        folder: takes an empty file `<stage>-<images>` for each wait, which a later start passes by.
        places: `<stage>-<images>`, the places.
    """

    def __init__(self, folder, places):
        self.folder, self.places = Path(folder), places

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        place = f"{module.stage}-{module.images_seen}"
        if not trainer.is_global_zero or place not in self.places or (self.folder / place).exists():
            return
        (self.folder / place).touch()
        interrupt = next(callback for callback in trainer.callbacks if isinstance(callback, Interrupt))
        while interrupt.received is None and not (self.folder / "go").exists():
            time.sleep(0.1)


def hold(folder, *places):
    """The overrides that put a `Hold` into a training."""
    target = "+callbacks.hold._target_=tests.clusters.callbacks.Hold"
    return target, f"+callbacks.hold.folder={folder}", f"+callbacks.hold.places=[{','.join(places)}]"

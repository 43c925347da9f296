"""Schedules callbacks by the number of training images."""

from __future__ import annotations

from lightning import Trainer

from ldm_lab.training.stage_module import StageModule


class Every:
    """`due(trainer, module)` is true at the end of the step that crosses a multiple of `images`.

    It is never true inside an accumulated batch, as a checkpoint holds no partly accumulated gradients.
    """

    def __init__(self, images: int) -> None:
        self.images = images
        self.last = 0

    def start(self, module: StageModule) -> None:
        """Start the interval at the number of images seen so far."""
        self.last = module.images_seen

    def due(self, trainer: Trainer, module: StageModule) -> bool:
        """Whether the run has crossed a multiple since the last call."""
        if module.images_seen % trainer.datamodule.global_batch_size:
            return False
        crossed = self.crossed(module)
        if crossed:
            self.last = module.images_seen
        return crossed

    def crossed(self, module: StageModule) -> bool:
        """Like `due` at the end of a step, but without recording the call."""
        return module.images_seen // self.images > self.last // self.images

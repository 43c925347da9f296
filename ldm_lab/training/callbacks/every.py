"""When to act: every so many training images."""

from __future__ import annotations

from lightning import Trainer

from ldm_lab.training.stage_module import StageModule


class Every:
    """`due(trainer, module)` is true at the end of the step that crosses a multiple of `images`.

    It is never true inside an accumulated batch: between steps of the optimizer the state is whole.
    """

    def __init__(self, images: int) -> None:
        self.images = images
        self.last = 0

    def start(self, module: StageModule) -> None:
        """Begin to count where the run stands."""
        self.last = module.images_seen

    def due(self, trainer: Trainer, module: StageModule) -> bool:
        """Whether a multiple was crossed since the last time."""
        if module.images_seen % trainer.datamodule.global_batch_size:
            return False
        crossed = self.crossed(module)
        if crossed:
            self.last = module.images_seen
        return crossed

    def crossed(self, module: StageModule) -> bool:
        """The same at the end of a step, without taking note."""
        return module.images_seen // self.images > self.last // self.images

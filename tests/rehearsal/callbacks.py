"""Callbacks of the rehearsal's trainings."""

from lightning import Callback

from tests.rehearsal.rules import LOG


class Steps(Callback):
    """`waits[n]`: those from the start of the step at n images to the start of the next one."""

    waits: dict = {}  # noqa: RUF012  of the last training; callbacks are made by the config

    def on_fit_start(self, trainer, module):
        self.waits.clear()
        self.begun, self.at = 0, None

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if module.images_seen % trainer.datamodule.global_batch_size == 0:
            if self.at is not None:
                self.waits[self.at] = LOG.waits[self.begun :]
            self.begun, self.at = len(LOG.waits), module.images_seen


class SpoilGradient(Callback):
    """The gradient of the step at `images` images is not finite."""

    def __init__(self, images):
        self.images, self.now = images, False

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.now = module.images_seen == self.images

    def on_after_backward(self, trainer, module):
        if self.now:
            next(p for p in module.parameters() if p.grad is not None).grad.fill_(float("nan"))

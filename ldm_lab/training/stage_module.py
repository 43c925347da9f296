"""What the LightningModules of both stages share: progress in images, the optimizer, the checkpoint's entry."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

from ldm_lab.checkpoints import checkpoint
from ldm_lab.models.layout import follow_parameters
from ldm_lab.models.pretrained import PretrainedModel
from ldm_lab.utils import randomness
from ldm_lab.utils.limits import Whole
from ldm_lab.utils.reading import LoadError
from ldm_lab.utils.transfer import to_device
from ldm_lab.utils.version import FORMAT, FORMAT_KEY, __version__


class StageModule(LightningModule):
    """Base of the two stages.

    Args:
        optimizer: called with parameter groups.
        schedule: images seen -> multiplier of the learning rate.
        seed: every random number follows from it and an image's position.

    Attributes:
        images_seen: training images so far, over all ranks. Lightning's `global_step` counts batches.
        terms: what the step costs, by name: sums over its micro-batches so far, each with its share of the step, so
            that they end as means; 0-dim, of this rank.
        step_left_out: whether the optimizer's step is left out, and what follows it with it (see `NotFinite`).
    """

    stage: ClassVar[str]

    def __init__(
        self,
        optimizer: Callable[[Iterable[dict]], torch.optim.Optimizer],
        schedule: Callable[[int], float],
        seed: Whole = 0,
    ) -> None:
        super().__init__()
        self.make_optimizer, self.schedule, self.seed = optimizer, schedule, seed
        self.images_seen = 0
        self.terms: dict[str, Tensor] = {}
        self.step_left_out = False

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What is trained, as optimizers take it."""
        raise NotImplementedError

    def exported(self) -> dict[str, tuple[str, PretrainedModel]]:
        """Networks of the result: name -> (prefix in the state dict, network)."""
        raise NotImplementedError

    def configs(self) -> dict[str, dict[str, Any]]:
        """Configs of the result by name, as plain data; each names its class."""
        return {
            name: {"_class_name": network.class_name(), **network.config}
            for name, (_, network) in self.exported().items()
        }

    def compile_networks(self) -> None:
        """Compile what is called in a step, in place: the keys of checkpoints stay as they are."""
        raise NotImplementedError

    def new_optimizer(self) -> torch.optim.Optimizer:
        """As the settings have it, but that `fused` holds only where the device has such kernels."""
        optimizer = self.make_optimizer(self.parameter_groups())
        for group in optimizer.param_groups:
            if group.get("fused") and self.device.type not in _get_fused_kernels_supported_devices():
                group["fused"] = False
        return optimizer

    def configure_optimizers(self) -> dict[str, Any]:
        """One optimizer; its learning rate follows the images of the steps taken."""
        optimizer = self.new_optimizer()
        optimizer.register_load_state_dict_post_hook(follow_parameters)
        # A fused one could undo the scaling of float16 itself; left to Lightning, gradients can be clipped before it.
        optimizer._step_supports_amp_scaling = False
        images_per_step = self.trainer.datamodule.global_batch_size
        scheduler = LambdaLR(optimizer, lambda step: self.schedule(step * images_per_step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip each network by the norm of its own gradient: the players of stage 1 have losses of different sizes."""
        if gradient_clip_algorithm not in (None, "norm"):
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif gradient_clip_val:
            for group in optimizer.param_groups:  # one a network, see `trainable`
                nn.utils.clip_grad_norm_(group["params"], gradient_clip_val)

    def on_train_start(self) -> None:
        """Let rates follow the settings, also where a checkpoint brought those of an earlier start (`resume=force`)."""
        optimizer, scheduler = self.trainer.optimizers[0], self.trainer.lr_scheduler_configs[0].scheduler
        fresh = self.new_optimizer()
        scheduler.base_lrs = [group["lr"] for group in fresh.param_groups]
        for group, new in zip(optimizer.param_groups, fresh.param_groups, strict=True):
            group.update({key: value for key, value in new.items() if key != "params"})
            group["lr"] = new["lr"] * self.schedule(self.images_seen)
        optimizer.load_state_dict(optimizer.state_dict())  # where it counts its steps depends on `fused`

    def transfer_batch_to_device(self, batch: dict[str, Any], device: torch.device, dataloader_idx: int) -> dict:
        """Copy from pinned memory, also what was drawn here: for other memory the host would wait."""
        batch = {key: to_device(part, device) if isinstance(part, Tensor) else part for key, part in batch.items()}
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def on_train_batch_start(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Dropout and the like follow from (seed, images seen, rank), not from what was drawn before."""
        state = randomness.generator(self.seed, "layers", self.images_seen, self.global_rank)
        torch.manual_seed(state.initial_seed())
        if self.images_seen % self.trainer.datamodule.global_batch_size == 0:
            self.terms = {}

    def count(self, images: Tensor) -> None:
        """Add a batch `(B, ...)` of every rank to `images_seen`; an act of every `training_step`."""
        self.images_seen += len(images) * self.trainer.world_size
        self._log_images_seen()

    def log(self, name: str, value: float | Tensor, **how: Any) -> None:  # noqa: ANN401
        """Log a scalar. A number that no rank adds to stays on the host: to copy it, the host waits for the device."""
        if not isinstance(value, Tensor) and not how.get("sync_dist"):
            value = torch.tensor(value, dtype=torch.float64)
        super().log(name, value, **how)

    def log_terms(self, prefix: str, terms: dict[str, Tensor], batch_size: int) -> None:
        """Log scalars as `prefix/name`, beside the images seen, which every logger takes as its axis.

        In training these are means over the step, whatever is accumulated: loggers get those of its last micro-batch.
        """
        validating = not self.training
        if self.training:
            share = self.trainer.accumulate_grad_batches
            terms = {name: self.terms.get(name, 0) + value / share for name, value in terms.items()}
            self.terms = {**self.terms, **terms}
        self.log_dict(
            {f"{prefix}/{name}": value for name, value in terms.items()},
            batch_size=batch_size, on_step=not validating, on_epoch=validating,
            sync_dist=validating, add_dataloader_idx=False,
        )  # fmt: skip

    def on_validation_epoch_end(self) -> None:
        """The axis of all metrics, beside those of validation."""
        self._log_images_seen()

    def _log_images_seen(self) -> None:
        # float64: Lightning's default float32 cannot count past 16.7 million images. It is the same on all ranks.
        self.log("images_seen", torch.tensor(self.images_seen, dtype=torch.float64), batch_size=1)

    def on_save_checkpoint(self, state: dict[str, Any]) -> None:
        """Write the entry that makes the file explain itself (see `ldm_lab.checkpoints.checkpoint`)."""
        state[checkpoint.ENTRY] = {
            "stage": self.stage,
            "images_seen": self.images_seen,
            "version": __version__,
            FORMAT_KEY: FORMAT,
            "configs": self.configs(),
            "prefixes": {name: prefix for name, (prefix, _) in self.exported().items()},
        }

    def on_load_checkpoint(self, state: dict[str, Any]) -> None:
        """Take up the count where the file left it. Raises `LoadError` where it is of another architecture."""
        entry = state.get(checkpoint.ENTRY) or {}
        if entry.get("stage") != self.stage:
            raise LoadError(f"a checkpoint of stage {entry.get('stage')!r} cannot continue stage {self.stage!r}")
        saved, own = ({key: tuple(t.shape) for key, t in d.items()} for d in (state["state_dict"], self.state_dict()))
        if different := sorted(key for key in {**saved, **own} if saved.get(key) != own.get(key)):
            key = different[0]
            raise LoadError(
                f"the checkpoint is of another network ({key} has shape {saved.get(key)} there, {own.get(key)} here):"
                " choose another name=, or the settings it was made with"
            )
        self.images_seen = int(entry["images_seen"])


def trainable(*networks: nn.Module) -> list[dict[str, Any]]:
    """One parameter group a network, those without trainable parameters left out."""
    groups = [[p for p in network.parameters() if p.requires_grad] for network in networks]
    return [{"params": group} for group in groups if group]

"""Base class of the LightningModules of both stages: progress in images, optimizer, checkpoint metadata."""

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
    """Base class of both stages.

    Args:
        optimizer: makes the optimizer from parameter groups.
        schedule: images seen -> multiplier of the learning rate.
        seed: every random number is a function of this seed and an image's position.

    Attributes:
        images_seen: training images so far, over all ranks. Lightning's `global_step` counts batches.
        terms: loss terms of the step by name, 0-dim, of this rank: sums over the micro-batches so far, each divided
            by their number, so that they end as means.
        step_left_out: whether the optimizer's step, with EMA and codebook updates, is skipped (see `NotFinite`).
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
        """Parameter groups for the optimizer."""
        raise NotImplementedError

    def exported(self) -> dict[str, tuple[str, PretrainedModel]]:
        """Networks of the trained model: name -> (prefix in the state dict, network)."""
        raise NotImplementedError

    def configs(self) -> dict[str, dict[str, Any]]:
        """Configs of the trained model by name, as plain data; each config names its class."""
        return {name: network.described() for name, (_, network) in self.exported().items()}

    def compile_networks(self) -> None:
        """Compile the networks in place, so that the keys of checkpoints stay the same."""
        raise NotImplementedError

    def new_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer of the settings; `fused` is turned off if the device has no fused kernels."""
        optimizer = self.make_optimizer(self.parameter_groups())
        for group in optimizer.param_groups:  # torch has no public list of these devices
            if group.get("fused") and self.device.type not in _get_fused_kernels_supported_devices():
                group["fused"] = False
        return optimizer

    def configure_optimizers(self) -> dict[str, Any]:
        """One optimizer, with a learning rate scheduled by training images."""
        optimizer = self.new_optimizer()
        optimizer.register_load_state_dict_post_hook(follow_parameters)
        # A fused optimizer could unscale float16 gradients itself; if Lightning does, it can clip them first.
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
        """Clip each network by its own gradient norm: in stage 1 the losses of the two networks differ in size."""
        if gradient_clip_algorithm not in (None, "norm"):
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif gradient_clip_val:
            for group in optimizer.param_groups:  # one group per network, see `trainable`
                nn.utils.clip_grad_norm_(group["params"], gradient_clip_val)

    def on_train_start(self) -> None:
        """Apply the current optimizer settings, as a checkpoint restores those of an earlier start (`resume=force`)."""
        optimizer, scheduler = self.trainer.optimizers[0], self.trainer.lr_scheduler_configs[0].scheduler
        fresh = self.new_optimizer()
        scheduler.base_lrs = [group["lr"] for group in fresh.param_groups]
        for group, new in zip(optimizer.param_groups, fresh.param_groups, strict=True):
            group.update({key: value for key, value in new.items() if key != "params"})
            group["lr"] = new["lr"] * self.schedule(self.images_seen)
        optimizer.load_state_dict(optimizer.state_dict())  # `fused` decides on which device the steps are counted

    def transfer_batch_to_device(self, batch: dict[str, Any], device: torch.device, dataloader_idx: int) -> dict:
        """Copy from pinned memory, also the noise drawn here, as the host would wait for a copy of pageable memory."""
        batch = {key: to_device(part, device) if isinstance(part, Tensor) else part for key, part in batch.items()}
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def on_train_batch_start(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Seed dropout and the like by (seed, images seen, rank), so that a resumed run draws the same numbers."""
        state = randomness.generator(self.seed, "layers", self.images_seen, self.global_rank)
        torch.manual_seed(state.initial_seed())
        if self.images_seen % self.trainer.datamodule.global_batch_size == 0:
            self.terms = {}

    def count(self, images: Tensor) -> None:
        """Add a batch `(B, ...)` of every rank to `images_seen`; every `training_step` calls this."""
        self.images_seen += len(images) * self.trainer.world_size
        self._log_images_seen()

    def log(self, name: str, value: float | Tensor, **how: Any) -> None:  # noqa: ANN401
        """Log a scalar. A number without `sync_dist` stays on the CPU, as a copy would wait for the device."""
        if not isinstance(value, Tensor) and not how.get("sync_dist"):
            value = torch.tensor(value, dtype=torch.float64)
        super().log(name, value, **how)

    def log_terms(self, prefix: str, terms: dict[str, Tensor], batch_size: int) -> None:
        """Log scalars as `prefix/name`; all loggers take `images_seen` as the x axis.

        In training they are means over the step so far, whatever the accumulation: loggers get the last micro-batch's.
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
        """Log `images_seen`, the x axis of all metrics, with the validation metrics."""
        self._log_images_seen()

    def _log_images_seen(self) -> None:
        # float64, as Lightning's default float32 cannot count past 16.7 million images. All ranks have the same value.
        self.log("images_seen", torch.tensor(self.images_seen, dtype=torch.float64), batch_size=1)

    def on_save_checkpoint(self, state: dict[str, Any]) -> None:
        """Add the metadata that makes the checkpoint self-describing (see `ldm_lab.checkpoints.checkpoint`)."""
        state[checkpoint.ENTRY] = {
            "stage": self.stage,
            "images_seen": self.images_seen,
            "version": __version__,
            FORMAT_KEY: FORMAT,
            "configs": self.configs(),
            "prefixes": {name: prefix for name, (prefix, _) in self.exported().items()},
        }

    def on_load_checkpoint(self, state: dict[str, Any]) -> None:
        """Restore `images_seen`. Raises `LoadError` if the checkpoint has another stage or architecture."""
        entry = state.get(checkpoint.ENTRY) or {}
        if entry.get("stage") != self.stage:
            raise LoadError(f"a checkpoint of stage {entry.get('stage')!r} cannot continue stage {self.stage!r}")
        saved, model = ({key: tuple(t.shape) for key, t in d.items()} for d in (state["state_dict"], self.state_dict()))
        if different := sorted(key for key in {**saved, **model} if saved.get(key) != model.get(key)):
            key = different[0]
            raise LoadError(
                f"the checkpoint is of another network ({key} has shape {saved.get(key)} there, {model.get(key)} here):"
                " choose another name=, or the settings it was made with"
            )
        self.images_seen = int(entry["images_seen"])


def trainable(*networks: nn.Module) -> list[dict[str, Any]]:
    """One parameter group per network; networks without trainable parameters have none."""
    groups = [[p for p in network.parameters() if p.requires_grad] for network in networks]
    return [{"params": group} for group in groups if group]

"""What `trainer.accelerator=auto` is on Apple silicon. That all operations are there, each rehearsal checks itself."""

import lightning
import pytest
import torch
from lightning import Trainer
from lightning.pytorch.accelerators import MPSAccelerator
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

from ldm_lab.training import device
from tests.rehearsal import mps


@pytest.fixture
def mac(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)  # whatever this machine is


@pytest.mark.parametrize("accelerator", ["auto", "gpu", "mps"])
def test_it_is_apples_device_in_float32(mac, accelerator):
    assert device.device_type(accelerator) == "mps"
    assert device.resolve_precision("auto", accelerator) == "32-true"
    assert device.resolve_precision("bf16-mixed", accelerator) == "bf16-mixed"


def test_the_cpu_is_the_cpu(mac):
    assert device.device_type("cpu") == "cpu"
    assert device.resolve_precision("auto", "cpu") == "bf16-mixed"


def test_lightning_takes_it_too(mac, monkeypatch):
    for kind in (MPSAccelerator, lightning.fabric.accelerators.MPSAccelerator):
        monkeypatch.setattr(kind, "is_available", staticmethod(lambda: True))
    trainer = Trainer(accelerator="auto", devices=1, logger=False, enable_checkpointing=False)
    assert isinstance(trainer.accelerator, MPSAccelerator)
    assert trainer.strategy.root_device.type == "mps"


def test_the_optimizers_are_fused_there():
    assert "mps" in _get_fused_kernels_supported_devices()
    assert mps.without({"aten._fused_adamw_.default", "aten._fused_adam_.default"}) == set()


def test_the_table_knows_what_is_missing():
    assert mps.without({"aten.add.Tensor", "aten._fused_sdp_choice.default", "aten.cudnn_convolution.default"}) == {
        "aten._fused_sdp_choice.default", "aten.cudnn_convolution.default",
    }  # fmt: skip

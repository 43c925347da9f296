"""The device as Lightning knows devices: `trainer.accelerator=rehearsal`, with `RehearsalStrategy`."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.accelerators import Accelerator, AcceleratorRegistry
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor

from tests.rehearsal import device

OVERRIDES = (
    "trainer.accelerator=rehearsal",
    "trainer.strategy={_target_:tests.rehearsal.accelerator.RehearsalStrategy}",
    "trainer.precision=32-true",
    "plugins=[tests]",
)


class RehearsalAccelerator(Accelerator):
    """One device."""

    def setup_device(self, device: torch.device) -> None:
        pass

    def teardown(self) -> None:
        pass

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        return {}

    @staticmethod
    def parse_devices(devices: Any) -> list[int]:
        return [0]

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [torch.device(device.NAME, 0)]

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return device.NAME


class RehearsalStrategy(SingleDeviceStrategy):
    """One process, which refuses as several ones on GPUs would: NCCL reduces what lies on the device alone."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{**settings, "device": torch.device(device.NAME, 0)})

    def reduce(self, tensor: Any, *_: Any, **__: Any) -> Any:
        if isinstance(tensor, Tensor) and tensor.device.type == "cpu":
            raise RuntimeError("No backend type associated with device type cpu (what NCCL says of a CPU tensor)")
        return tensor


def register() -> None:
    """Let Lightning know it, once."""
    if device.NAME not in AcceleratorRegistry:
        AcceleratorRegistry.register(device.NAME, RehearsalAccelerator, description="a second device, for tests")

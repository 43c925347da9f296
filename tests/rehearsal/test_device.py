"""The rehearsal's device computes as the CPU does, and keeps its rules."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from ldm_lab.utils.transfer import to_device


def network():
    torch.manual_seed(0)
    parts = nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.SiLU(), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(288, 4)
    return nn.Sequential(*parts)


@pytest.mark.parametrize("settings", [{}, {"fused": True}, {"foreach": True}])
def test_it_trains_as_the_cpu_does(rehearsal, settings):
    here, images = network(), torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    there, found = copy.deepcopy(here).to(rehearsal.device), []
    for model, batch in ((here, images), (there, images.to(rehearsal.device))):
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2, **settings)
        for _ in range(3):
            optimizer.zero_grad()
            loss = model(batch).square().mean()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        found.append(loss.detach().cpu())
    assert all(value.device.type == "rehearsal" for value in there.state_dict().values())
    assert torch.allclose(*found, rtol=1e-5)
    for name, value in here.state_dict().items():
        assert torch.allclose(value, there.state_dict()[name].cpu(), atol=1e-5), name


def test_it_need_not_come_before_the_first_backward_of_the_process():
    """The tests that use it come last, and torch's engine has counted devices long before."""
    code = (
        "import torch; from tests import conftest; torch.ones(1, requires_grad=True).sum().backward()\n"
        "assert not torch.accelerator.is_available()\n"
        "from tests.rehearsal import device; there = torch.ones(1).to(device.register()).requires_grad_()\n"
        "(there * 3).sum().backward(); print(there.grad.item())"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.stdout == "3.0\n", found.stderr


MIXED = {
    "stack": lambda a: torch.stack([torch.tensor(1.0), a.sum()]),
    "cat": lambda a: torch.cat([a, torch.ones(3, 4)]),
    "add": lambda a: a + torch.ones(4),
    "in place": lambda a: torch.tensor(1.0).add_(a.sum()),
    "matmul": lambda a: torch.ones(2, 3) @ a,
    "index by the device": lambda a: torch.ones(3)[torch.ones(1, dtype=torch.long).to(a.device)],
    "linear": lambda a: nn.Linear(4, 2)(a),
}


@pytest.mark.parametrize("name", MIXED)
def test_devices_do_not_mix(rehearsal, name):
    with pytest.raises(RuntimeError, match="same device"):
        MIXED[name](torch.ones(3, 4).to(rehearsal.device))


def test_but_for_single_numbers_in_arithmetic(rehearsal):
    a = torch.ones(3, 4).to(rehearsal.device)
    two = torch.tensor(2.0)
    for result in (a * two, two + a, torch.where(a > 0, two, a), a.clamp(max=two), a.fill_(two)):
        assert result.device == rehearsal.device
    assert rehearsal.log.waits[1:] == []  # but for the copy of `a`


WAITS = {
    "item": lambda a: a.sum().item(),
    "float": lambda a: float(a[0, 0]),
    "bool": lambda a: bool(a.sum()),
    "tolist": lambda a: a.tolist(),
    "to the host": lambda a: a.cpu(),
    "nonzero": lambda a: a.nonzero(),
    "masked_select": lambda a: a.masked_select(a > 0),
    "mask": lambda a: a[a > 0],
    "index of the host": lambda a: a[torch.tensor([1])],
    "unique": lambda a: a.unique(),
    "equal": lambda a: torch.equal(a, a),
    "repeats": lambda a: a.flatten().repeat_interleave(a.flatten().long()),
    "from the host": lambda a: torch.ones(2).to(a.device),
    "from pageable memory, not blocking": lambda a: torch.ones(2).to(a.device, non_blocking=True),
    "new_tensor": lambda a: a.new_tensor([1.0, 2.0]),
    "tensor": lambda a: torch.tensor([1.0, 2.0], device=a.device),
}


@pytest.mark.parametrize("name", WAITS)
def test_waits_are_noticed(rehearsal, name):
    a = torch.ones(3, 4).to(rehearsal.device)
    rehearsal.log.clear()
    WAITS[name](a)
    assert rehearsal.log.waits


def test_what_does_not_wait_does_not(rehearsal):
    a = torch.ones(3, 4).to(rehearsal.device)
    rehearsal.log.clear()
    a.to("cpu", non_blocking=True)
    torch.ones(2).pin_memory().to(a.device, non_blocking=True)
    to_device(torch.ones(2), a.device)
    a.new_full((), 3.0), torch.full((2,), 1.0, device=a.device), torch.arange(3, device=a.device)
    a[a > 0] = 0.0
    torch.where(a > 0, a, 1.0), a[1], a.std(), a.sort(), a.topk(2), a.masked_fill_(a > 0, 1.0)
    assert rehearsal.log.waits == []


@pytest.mark.parametrize(
    "make",
    [lambda d: torch.ones(2).to(d).double(), lambda d: torch.zeros(2, dtype=torch.float64, device=d),
     lambda d: torch.ones(2, dtype=torch.float64).to(d), lambda d: torch.ones(2).to(d).sum(dtype=torch.float64)],
)  # fmt: skip
def test_it_has_no_float64(rehearsal, make):
    with pytest.raises(TypeError, match="float64"):
        make(rehearsal.device)


def test_a_wait_says_who_waits(rehearsal):
    from ldm_lab.utils.images import to_uint8

    to_uint8(torch.ones(1, 3, 2, 2).to(rehearsal.device))
    assert rehearsal.log.waits[-1].places == ("utils/images.py: to_uint8",)

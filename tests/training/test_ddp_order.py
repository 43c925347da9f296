"""More than two processes: a resumed training adds up gradients in the order of an undisturbed one."""

import copy
import os
from pathlib import Path

import pytest
import torch
import yaml
from torch.nn.parallel import DistributedDataParallel

from tests.reliability.commands import free_port
from tests.trained import assert_equal

ROOT = Path(__file__).resolve().parents[2]
RANKS = 3  # the sum of two numbers has one order


def settings():
    """What `trainer=ddp` gives to torch."""
    strategy = yaml.safe_load((ROOT / "configs/trainer/ddp.yaml").read_text(encoding="utf-8"))["strategy"]
    return {key: value for key, value in strategy.items() if key != "_target_"}


def new():
    torch.manual_seed(0)
    network = torch.nn.Sequential(*[torch.nn.Linear(37, 37) for _ in range(4)])
    return network, torch.optim.Adam(network.parameters())


def train(network, optimizer, steps, rank):
    """One start."""
    wrapped = DistributedDataParallel(network, bucket_cap_mb=0.01, **settings())
    for step in steps:
        images = torch.randn(5, 37, generator=torch.Generator().manual_seed(100 * step + rank))
        optimizer.zero_grad()
        wrapped(images).pow(2).mean().backward()
        optimizer.step()


def compare(rank, port):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=RANKS)
    torch.set_num_threads(1)
    train(*(undisturbed := new()), range(8), rank)
    train(*(stopped := new()), range(3), rank)
    network, optimizer = new()
    network.load_state_dict(stopped[0].state_dict())
    optimizer.load_state_dict(copy.deepcopy(stopped[1].state_dict()))
    train(network, optimizer, range(3, 8), rank)
    assert_equal(dict(network.state_dict()), dict(undisturbed[0].state_dict()))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_a_resumed_training_rounds_like_an_undisturbed_one():
    torch.multiprocessing.start_processes(compare, (free_port(),), nprocs=RANKS, start_method="spawn")

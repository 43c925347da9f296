import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from ldm_lab.training.ema import EMA
from tests.helpers import GOLDEN, assert_close_relative


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).to(dtype)


def shift(module, amount=1.0):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(amount)


def test_shadow_of_the_original():
    golden = load_file(GOLDEN / "compvis/schedule.safetensors")
    module = nn.ParameterDict({"weight": nn.Parameter(golden["ema.param"][0].clone())})
    ema = EMA(module, decay=0.9999)
    assert_close_relative(torch.tensor([ema.decay(n) for n in range(1, 21)]), golden["ema.decay_first_20"], 1e-6)
    for n in range(1, 21):
        with torch.no_grad():
            module["weight"].copy_(golden["ema.param"][n])
        ema.update(module)
        assert_close_relative(ema.model["weight"], golden["ema.shadow"][n], 1e-6)
    assert ema.num_updates == 20


def test_decay_warms_up_to_its_maximum():
    ema = EMA(network(), decay=0.9999)
    decays = [ema.decay(n) for n in range(1, 100_000, 1000)]
    assert decays == sorted(decays)
    assert decays[0] == pytest.approx(2 / 11)
    assert ema.decay(80_000) < 0.9999
    assert ema.decay(90_000) == 0.9999


def test_buffers_are_copied_not_averaged():
    module = network()
    ema = EMA(module)
    module(torch.randn(16, 3))
    ema.update(module)
    assert torch.equal(ema.model[1].running_mean, module[1].running_mean)
    assert ema.model[1].num_batches_tracked == 1


def test_a_network_of_lower_precision_has_a_float32_average():
    module = network(torch.bfloat16)
    ema = EMA(module, decay=0.5)
    before = ema.model[0].weight.clone()
    shift(module, 2**-6)
    ema.update(module)
    assert ema.model[0].weight.dtype == torch.float32
    expected = before + (1 - 2 / 11) * (module[0].weight.float() - before)
    assert_close_relative(ema.model[0].weight, expected, 1e-6)


def test_the_copy_is_frozen_and_stays_in_evaluation_mode():
    module = network()
    owner = nn.ModuleDict({"network": module, "ema": EMA(module)})
    owner.train()
    assert owner.training
    assert not any(part.training for part in owner["ema"].model.modules())
    assert not any(p.requires_grad for p in owner["ema"].parameters())
    assert module[0].weight.requires_grad


def test_the_network_is_not_touched():
    module = network()
    ema, before = EMA(module), copy.deepcopy(module.state_dict())
    shift(ema.model)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


def test_it_is_saved_with_its_owner_and_continues():
    module = network()
    ema, resumed = EMA(module), EMA(network())
    for _ in range(3):
        shift(module)
        ema.update(module)
    resumed.load_state_dict(ema.state_dict())
    for average in (ema, resumed):
        average.update(module)
    assert resumed.num_updates == 4
    assert all(torch.equal(value, resumed.state_dict()[key]) for key, value in ema.state_dict().items())


def test_a_network_compiled_in_place():
    module = network()
    module.compile(backend="eager")
    ema = EMA(module, decay=0.0)
    shift(module)
    ema.update(module)
    assert torch.equal(ema.model[0].weight, module[0].weight)
    assert ema.state_dict().keys() == {"num_updates", *(f"model.{key}" for key in module.state_dict())}
    assert ema.model(torch.zeros(2, 3)).shape == (2, 2)


def test_another_network_is_refused():
    ema = EMA(network())
    with pytest.raises(ValueError, match=r"another network: '2\.bias'"):
        ema.update(network()[:2])
    assert ema.num_updates == 0


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_an_impossible_decay_is_refused(decay):
    with pytest.raises(ValueError, match=f"decay={decay}"):
        EMA(network(), decay=decay)

"""Muon against its definition, torch's own for matrices, and AdamW for all else."""

import pytest
import torch
from torch import nn

from ldm_lab.training.muon import ITERATIONS, QUINTIC, Muon, orthogonal
from ldm_lab.utils.errors import UserError


@pytest.mark.parametrize("shape", [(48, 400), (400, 48), (64, 64)])
def test_singular_values_become_alike(shape):
    u, s, vt = torch.linalg.svd(torch.randn(shape, generator=torch.Generator().manual_seed(0)), full_matrices=False)
    s = torch.logspace(0, -2, len(s))  # a hundredfold difference
    (found,) = orthogonal([u * s @ vt])
    assert torch.linalg.svdvals(found).sub(1).abs().max() < 0.35
    assert (u * torch.diag(u.T @ found @ vt.T) @ vt - found).abs().max() < 1e-4  # the directions stay


def test_equals_the_iteration_on_the_matrix_itself():
    matrix = torch.randn(40, 300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x, (a, b, c) = matrix / matrix.norm(), QUINTIC
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    others = [torch.randn(shape, generator=torch.Generator().manual_seed(1)) for shape in ((300, 40), (50, 60))]
    found = orthogonal([others[0], matrix.float(), others[1]])
    assert torch.allclose(found[1], x.float(), atol=1e-5)
    for other, alone in zip((others[0], others[1]), (found[0], found[2]), strict=True):
        assert torch.allclose(orthogonal([other])[0], alone, atol=1e-5)


def test_a_zero_matrix_stays_zero():
    assert orthogonal([torch.zeros(32, 64)])[0].eq(0).all()


def _trained(optimizer, weight: nn.Parameter, steps: int = 5) -> torch.Tensor:
    rng = torch.Generator().manual_seed(1)
    for _ in range(steps):
        weight.grad = torch.randn(weight.shape, generator=rng)
        optimizer.step()
    return weight.detach()


def test_a_convolution_moves_as_its_matrix_in_torch():
    start = torch.randn(64, 16, 3, 3, generator=torch.Generator().manual_seed(0))
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.flatten(1).clone())
    moved = _trained(Muon([ours], lr=1e-2, momentum=0.95, weight_decay=0.1), ours) - start
    torchs = torch.optim.Muon([theirs], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    expected = _trained(torchs, theirs) - start.flatten(1)
    assert (moved.flatten(1) - expected).norm() < 0.02 * expected.norm()  # torch iterates in bfloat16


@pytest.mark.parametrize("shape", [(64,), (64, 64), (3, 64, 3, 3), (64, 3, 3, 3)])
def test_all_else_moves_as_with_adamw(shape):
    start = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    settings = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.99)}
    moved = _trained(Muon([ours], **settings), ours)
    assert torch.equal(moved, _trained(torch.optim.AdamW([theirs], **settings), theirs))


def test_the_layout_of_a_weight_changes_nothing():
    start = torch.randn(40, 16, 3, 3, generator=torch.Generator().manual_seed(0))
    outermost, innermost = nn.Parameter(start.clone()), nn.Parameter(start.to(memory_format=torch.channels_last))
    assert torch.equal(_trained(Muon([outermost]), outermost), _trained(Muon([innermost]), innermost))


def test_resumes_bit_for_bit():
    def network():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(32, 40, 3), nn.GroupNorm(8, 40), nn.Conv2d(40, 3, 3))

    def train(net, optimizer, steps, seed):
        rng = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            optimizer.zero_grad()
            net(torch.randn(2, 32, 8, 8, generator=rng)).square().mean().backward()
            optimizer.step()

    whole, part, rest = network(), network(), network()
    optimizer = Muon(whole.parameters(), fused=True)
    train(whole, optimizer, 3, seed=1)
    train(whole, optimizer, 3, seed=2)
    first = Muon(part.parameters(), fused=True)
    train(part, first, 3, seed=1)
    rest.load_state_dict(part.state_dict())
    second = Muon(rest.parameters(), fused=True)
    second.load_state_dict(first.state_dict())
    train(rest, second, 3, seed=2)
    for one, other in zip(whole.parameters(), rest.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("setting", [{"lr": -1.0}, {"betas": (0.5, 1.0)}, {"weight_decay": -1.0}])
def test_a_value_out_of_range_is_named(setting):
    with pytest.raises(UserError, match=next(iter(setting)).replace("lr", "learning rate").replace("betas", "beta")):
        Muon([nn.Parameter(torch.ones(2))], **setting)


def test_the_closure_computes_the_gradients():
    weight = nn.Parameter(torch.ones(32, 32, 1, 1))

    def closure():
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert Muon([weight]).step(closure) == 32 * 32
    assert weight.grad is not None
    assert not torch.equal(weight, torch.ones(32, 32, 1, 1))

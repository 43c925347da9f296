"""SimVQ: a plain codebook in value, whose codes all move with one matrix."""

import pytest
import torch

from ldm_lab.models.codebook import CodebookUsage
from ldm_lab.models.quantizer import VectorQuantizer
from ldm_lab.models.simvq import SimVQ
from tests.helpers import assert_close_relative


@pytest.fixture
def simvq():
    torch.manual_seed(0)
    simvq = SimVQ(32, 3)
    with torch.no_grad():
        simvq.weight.add_(0.3 * torch.randn(3, 3))
    return simvq


@pytest.fixture
def quantizer(simvq):
    """A plain quantizer with its codes."""
    quantizer = VectorQuantizer(32, 3)
    simvq.write(quantizer.embedding.weight)
    return quantizer


def test_codes_start_gaussian_of_unit_length():
    simvq = SimVQ(4096, 4)
    assert torch.equal(simvq(), simvq.basis)
    assert simvq.basis.square().sum(1).mean().item() == pytest.approx(1, rel=0.05)
    assert [name for name, _ in simvq.named_parameters()] == ["weight"]
    assert set(simvq.state_dict()) == {"basis", "weight"}


def test_values_are_those_of_the_plain_codebook(simvq, quantizer):
    latents = torch.randn(2, 3, 4, 4)
    plain, ours = quantizer(latents), quantizer(latents, simvq())
    assert torch.equal(ours.quantized, plain.quantized)
    assert torch.equal(ours.loss, plain.loss)
    assert torch.equal(ours.info.indices, plain.info.indices)


def test_one_latent_moves_all_codes(simvq, quantizer):
    latents = torch.randn(1, 3, 1, 1)
    output = quantizer(latents, simvq())
    output.loss.backward()
    code, latent = simvq.basis[output.info.indices][0], latents.flatten()
    expected = torch.outer(code, 2 * quantizer.beta * (code @ simvq.weight - latent) / 3)  # CompVis's weights
    assert_close_relative(simvq.weight.grad, expected.detach(), 1e-5)
    assert quantizer.embedding.weight.grad is None
    before = simvq().detach()
    torch.optim.SGD(simvq.parameters(), lr=1.0).step()
    assert ((simvq() - before).abs().amax(1) > 0).all()


def test_codes_are_float32_under_autocast(simvq):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = simvq()
    assert torch.equal(found, simvq.basis @ simvq.weight)


def test_replaced_codes_are_taken_over_and_no_others(simvq, quantizer):
    codes, basis = quantizer.embedding.weight, simvq.basis.clone()
    before, drawn = codes.detach().clone(), torch.randn(2, 3)
    with torch.no_grad():
        codes[[3, 7]] = drawn
    simvq.follow(codes)
    assert_close_relative(codes[[3, 7]].detach(), drawn, 1e-5)
    assert torch.equal(codes, simvq())
    others = [place for place in range(32) if place not in (3, 7)]
    assert torch.equal(simvq.basis[others], basis[others])
    assert torch.equal(codes[others], before[others])


def test_without_an_inverse_codes_stay(simvq, quantizer):
    with torch.no_grad():
        simvq.weight.zero_()
    simvq.write(quantizer.embedding.weight)
    basis = simvq.basis.clone()
    torch.nn.init.normal_(quantizer.embedding.weight)
    simvq.follow(quantizer.embedding.weight)
    assert torch.equal(simvq.basis, basis)
    assert torch.equal(quantizer.embedding.weight, simvq())


def test_the_codebook_is_drawn_from_latents(simvq, quantizer):
    usage, latents = CodebookUsage(32), torch.randn(2, 3, 4, 4)
    usage.update(quantizer, latents, quantizer(latents).info.indices, step=0, seed=0)
    simvq.follow(quantizer.embedding.weight)
    rows = latents.permute(0, 2, 3, 1).reshape(-1, 3)
    distances = torch.cdist(simvq().detach(), rows, compute_mode="donot_use_mm_for_euclid_dist")
    assert distances.min(1).values.max() < 1e-5


def test_it_starts_from_trained_codes(simvq):
    codes = torch.randn(32, 3)
    simvq.start(codes)
    assert torch.equal(simvq(), codes)
    assert torch.equal(simvq.weight, torch.eye(3))

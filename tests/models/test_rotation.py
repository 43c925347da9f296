"""The rotation trick: values of the codes, gradients that keep their angle to the latent."""

import pytest
import torch
import torch.nn.functional as F

from ldm_lab.models.quantizer import VectorQuantizer
from ldm_lab.models.rotation import rotate
from tests.helpers import assert_close_relative


def vectors(seed, count=64, dim=3):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradient_of(latents, codes, weights):
    latents = latents.clone().requires_grad_()
    (rotate(latents, codes) * weights).sum().backward()
    return latents.grad


def matrix(latent, code):
    """|q| / |e| R, as a matrix: the rotation in the plane of e and q by the angle between them (Rodrigues' formula)."""
    e, q = F.normalize(latent, dim=0), F.normalize(code, dim=0)
    cosine, aside = e @ q, torch.outer(q, e) - torch.outer(e, q)
    rotation = torch.eye(len(e), dtype=e.dtype) + aside + aside @ aside / (1 + cosine)
    return code.norm() / latent.norm() * rotation


def test_the_value_is_that_of_the_code():
    latents, codes = vectors(0).float(), vectors(1).float()
    assert torch.equal(rotate(latents, codes), codes)


@pytest.mark.parametrize("dim", [2, 3, 8])
def test_the_gradient_is_that_of_the_rotation(dim):
    latents, codes, weights = (vectors(seed, dim=dim) for seed in range(3))
    found = gradient_of(latents, codes, weights)
    expected = torch.stack([matrix(e, q).T @ g for e, q, g in zip(latents, codes, weights, strict=True)])
    assert_close_relative(found, expected, 1e-10)


def test_the_gradient_keeps_its_angle_and_is_scaled():
    latents, codes, weights = (vectors(seed) for seed in range(3))
    found = gradient_of(latents, codes, weights)
    assert_close_relative(found.norm(dim=1), weights.norm(dim=1) * codes.norm(dim=1) / latents.norm(dim=1), 1e-10)
    assert_close_relative(F.cosine_similarity(found, latents), F.cosine_similarity(weights, codes), 1e-10)


def test_where_there_is_no_rotation_the_gradient_is_finite():
    code, weights = torch.tensor([1.0, 2.0, -2.0]), torch.tensor([1.0, 1.0, 1.0])
    assert torch.equal(gradient_of(torch.zeros(3), code, weights), weights)  # straight through
    for latent, end in ((-code, code), (-2 * code, code), (code, code), (code, 0 * code), (1e-7 * code, code)):
        found = gradient_of(latent, end, weights)
        assert found.isfinite().all()
        assert found.norm() <= 1.001 * weights.norm()
    opposite = gradient_of(-code, code, code)  # the gradient along the code becomes that along the latent
    assert_close_relative(opposite, -code, 1e-6)


def test_a_quantizer_rotates_its_gradients_and_keeps_its_values():
    quantizer, latents = VectorQuantizer(16, 3), torch.randn(2, 3, 4, 4, requires_grad=True)
    torch.nn.init.normal_(quantizer.embedding.weight)
    plain = quantizer(latents)
    quantizer.gradient = rotate
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = quantizer(latents)
    assert output.quantized.dtype == torch.float32
    assert_close_relative(output.quantized, plain.quantized, 1e-6)
    assert torch.equal(output.loss, plain.loss)
    output.quantized.sum().backward()
    rows = latents.detach().permute(0, 2, 3, 1).reshape(-1, 3)
    codes = quantizer.embedding.weight.detach()[output.info.indices]
    expected = gradient_of(rows, codes, torch.ones_like(rows))
    assert_close_relative(latents.grad.permute(0, 2, 3, 1).reshape(-1, 3), expected, 1e-5)
    assert quantizer.embedding.weight.grad is None

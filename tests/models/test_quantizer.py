import pytest
import torch

from ldm_lab.models.quantizer import VectorQuantizer, code_counts, perplexity
from tests.helpers import assert_close_relative


@pytest.fixture
def latents():
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def spread_out(n, dim=3, seed=1, **settings):
    quantizer = VectorQuantizer(n, dim, **settings)
    torch.nn.init.normal_(quantizer.embedding.weight, generator=torch.Generator().manual_seed(seed))
    return quantizer


def nearest(latents, codes):
    """Brute force in float64: `(B, C, H, W)` and `(n, C)` -> `(B*H*W,)`."""
    rows = latents.double().permute(0, 2, 3, 1).reshape(-1, 1, latents.shape[1])
    return (rows - codes.double()).square().sum(-1).argmin(-1)


def test_every_latent_becomes_its_nearest_code(latents):
    quantizer = spread_out(16)
    quantized, loss, (_, min_encodings, indices) = quantizer(latents)
    codes = quantizer.embedding.weight
    assert torch.equal(indices, nearest(latents, codes))
    expected = codes[indices].view(2, 4, 4, 3).permute(0, 3, 1, 2)
    assert_close_relative(quantized.detach(), expected.detach(), 1e-6)
    assert_close_relative(loss.detach(), 1.25 * (expected - latents).square().mean().detach(), 1e-5)
    assert min_encodings is None


@pytest.mark.parametrize(("legacy", "commitment", "codebook"), [(True, 1.0, 0.25), (False, 0.25, 1.0)])
def test_gradients_of_the_loss(latents, legacy, commitment, codebook):
    quantizer = spread_out(16, legacy=legacy)
    latents.requires_grad_()
    output = quantizer(latents)
    output.loss.backward()
    codes, indices = quantizer.embedding.weight.detach(), output.info.indices
    difference = latents.detach().permute(0, 2, 3, 1).reshape(-1, 3) - codes[indices]  # z - e, (N, C)
    per_latent = 2 * commitment * difference / difference.numel()
    per_code = torch.zeros_like(codes).index_add_(0, indices, -2 * codebook * difference / difference.numel())
    assert_close_relative(latents.grad.permute(0, 2, 3, 1).reshape(-1, 3), per_latent, 1e-5)
    assert_close_relative(quantizer.embedding.weight.grad, per_code, 1e-5)


def test_beta_and_legacy_may_be_set_later(latents):
    quantizer = spread_out(16)
    quantizer.legacy, quantizer.beta = False, 0.5
    reference = spread_out(16, legacy=False, beta=0.5)
    assert torch.equal(quantizer(latents).loss, reference(latents).loss)


def test_gradients_pass_straight_through(latents):
    quantizer, weights = spread_out(16), torch.randn(2, 3, 4, 4)
    latents.requires_grad_()
    (quantizer(latents).quantized * weights).sum().backward()
    assert torch.equal(latents.grad, weights)
    assert quantizer.embedding.weight.grad is None


def crowded():
    """Codes so close that a matrix product in bfloat16 cannot tell them apart."""
    quantizer = spread_out(256)
    with torch.no_grad():
        quantizer.embedding.weight.mul_(0.01).add_(1)
    latents = 1 + 0.01 * torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    return quantizer, latents


def test_distances_are_exact_under_autocast():
    quantizer, latents = crowded()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = quantizer(latents)
    agreement = (output.info.indices == nearest(latents, quantizer.embedding.weight)).float().mean()
    assert agreement > 0.99  # float32 itself decides a few near ties differently from float64
    assert output.loss.dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: CPUs multiply float32 exactly")
def test_distances_do_not_depend_on_the_precision_of_matrix_products():
    quantizer, latents = crowded()
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        indices = quantizer.cuda()(latents.cuda()).info.indices.cpu()
    finally:
        torch.set_float32_matmul_precision(before)
    assert (indices == nearest(latents, quantizer.embedding.weight.cpu())).float().mean() > 0.99


def test_the_type_of_the_latents_is_kept(latents):
    quantizer = spread_out(16).to(torch.bfloat16)
    output = quantizer(latents.bfloat16())
    assert output.quantized.dtype == torch.bfloat16
    assert torch.equal(output.info.indices, nearest(latents.bfloat16(), quantizer.embedding.weight))


def test_perplexity_counts_the_codes_that_are_used_alike():
    assert perplexity(code_counts(torch.tensor([0, 1, 2, 3]), 8)).item() == pytest.approx(4)
    assert perplexity(code_counts(torch.tensor([5, 5, 5]), 8)).item() == pytest.approx(1)
    assert code_counts(torch.tensor([2, 0, 2]), 4).tolist() == [1, 0, 2, 0]


def test_codes_by_number():
    quantizer = spread_out(16)
    indices = torch.randint(0, 16, (2 * 4 * 5,))
    codes = quantizer.get_codebook_entry(indices, (2, 4, 5, 3))
    assert codes.shape == (2, 3, 4, 5)
    assert torch.equal(codes[1, :, 2, 3], quantizer.embedding.weight[indices[20 + 2 * 5 + 3]])
    assert torch.equal(quantizer.get_codebook_entry(indices), quantizer.embedding.weight[indices])


def test_the_codebook_is_the_only_tensor_and_starts_small():
    quantizer = VectorQuantizer(64, 3)
    assert set(quantizer.state_dict()) == {"embedding.weight"}
    assert quantizer.embedding.weight.abs().max() <= 1 / 64


def test_distances_are_taken_in_parts(monkeypatch):
    """As many rows at a time as memory is given to; the codes are the same."""
    quantizer = VectorQuantizer(7, 3)
    latents = torch.randn(50, 3)
    whole = quantizer.nearest(latents)
    for most in (1, 30, 7 * 50):
        monkeypatch.setattr("ldm_lab.models.quantizer.MOST_DISTANCES", most)
        assert torch.equal(quantizer.nearest(latents), whole)

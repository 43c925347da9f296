import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from ldm_lab.models.codebook import CodebookUsage, draw_latents
from ldm_lab.models.quantizer import VectorQuantizer


def train_toy(usage, steps=80, bf16=False):
    """A pointwise autoencoder of noise with 512 codes; returns how many of them held-out noise uses."""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Conv2d(6, 32, 1), nn.SiLU(), nn.Conv2d(32, 3, 1))
    decoder = nn.Sequential(nn.Conv2d(3, 32, 1), nn.SiLU(), nn.Conv2d(32, 6, 1))
    quantizer = VectorQuantizer(512, 3)
    optimizer = torch.optim.Adam(nn.ModuleList([encoder, decoder, quantizer]).parameters(), lr=3e-3)
    for step in range(steps):
        x = torch.randn(4, 6, 16, 16)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            latents = encoder(x)
            codes = quantizer(latents)
            loss = (decoder(codes.quantized) - x).square().mean() + codes.loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if usage is not None:
            usage.update(quantizer, latents, codes.info.indices, step=step, seed=0)
    with torch.no_grad():
        return len(quantizer(encoder(torch.randn(64, 6, 16, 16))).info.indices.unique())


def test_a_plain_codebook_collapses():
    assert train_toy(None) < 0.2 * 512


@pytest.mark.parametrize("settings", [{"init_step": 0}, {"init_step": 20}, {"init_step": None}])
def test_codes_stay_alive(settings):
    usage = CodebookUsage(512, **settings, decay=0.9)
    assert train_toy(usage) >= 0.9 * 512
    assert usage.used_fraction >= 0.9
    assert usage.perplexity > 200


def test_codes_stay_alive_under_autocast():
    assert train_toy(CodebookUsage(512, decay=0.9), bf16=True) >= 0.9 * 512


def clustered(n=8):
    """A quantizer, latents that only its code 0 is near to, and their indices."""
    quantizer = VectorQuantizer(n, 3)
    with torch.no_grad():
        quantizer.embedding.weight.copy_(torch.arange(n)[:, None].expand(-1, 3) * 10.0)
    latents = torch.randn(1, 3, 4, 4)
    return quantizer, latents, torch.zeros(16, dtype=torch.int64)


def rows_of(latents):
    return latents.permute(0, 2, 3, 1).reshape(-1, latents.shape[1])


def test_the_codebook_is_drawn_once_at_its_step():
    quantizer, latents, indices = clustered()
    usage = CodebookUsage(8, init_step=2, max_replaced=0)
    before = quantizer.embedding.weight.clone()
    for step in (0, 1):
        usage.update(quantizer, latents, indices, step=step, seed=0)
        assert torch.equal(quantizer.embedding.weight, before)
    usage.update(quantizer, latents, indices, step=2, seed=0)
    drawn = quantizer.embedding.weight.clone()
    assert all((rows_of(latents) == code).all(1).any() for code in drawn)
    assert len(drawn.unique(dim=0)) == 8
    usage.update(quantizer, torch.randn_like(latents), indices, step=3, seed=0)
    assert torch.equal(quantizer.embedding.weight, drawn)


def test_counting_steps_from_another_number_still_initialises():
    quantizer, latents, indices = clustered()
    usage = CodebookUsage(8, init_step=0)
    usage.update(quantizer, latents, indices, step=1, seed=0)
    assert usage.initialised
    assert quantizer.embedding.weight.max() < 10


def test_an_unused_code_becomes_a_latent_and_is_left_in_peace():
    quantizer, latents, indices = clustered()
    usage = CodebookUsage(8, init_step=None, decay=0.5, threshold=0.1, max_replaced=3)
    original, replaced = quantizer.embedding.weight.clone(), []
    for step in range(6):
        usage.update(quantizer, latents, indices, step=step, seed=0)
        replaced.append((quantizer.embedding.weight != original).any(1).sum().item())
    # shares halve from 1/8: under a tenth of the mean after 4 steps, then 3 at a time; code 0 is never touched
    assert replaced == [0, 0, 0, 3, 6, 7]
    assert torch.equal(quantizer.embedding.weight[0], original[0])
    assert all((rows_of(latents) == code).all(1).any() for code in quantizer.embedding.weight[1:])


def test_nothing_is_replaced_from_until_step_on():
    quantizer, latents, indices = clustered()
    usage = CodebookUsage(8, init_step=None, decay=0.5, until_step=3)
    before = quantizer.embedding.weight.clone()
    for step in range(10):
        usage.update(quantizer, latents, indices, step=step, seed=0)
    assert torch.equal(quantizer.embedding.weight, before)
    assert usage.used_fraction == 1 / 8


def test_usage_is_a_moving_average_of_shares():
    quantizer, latents, _ = clustered(4)
    usage = CodebookUsage(4, init_step=None, decay=0.75, max_replaced=0)
    usage.update(quantizer, latents, torch.tensor([[[0, 0, 0, 1]]]), step=0, seed=0)
    assert usage.usage.tolist() == pytest.approx([0.375, 0.25, 0.1875, 0.1875])


def test_few_latents_are_repeated_with_jitter():
    rows = torch.randn(5, 3)
    drawn = draw_latents(rows, 20, step=0, seed=0)
    assert len(drawn.unique(dim=0)) == 20
    assert torch.cdist(drawn, rows).min(1).values.max() < 0.1


def test_the_same_seed_and_step_draw_the_same():
    rows = torch.randn(50, 3)
    assert torch.equal(draw_latents(rows, 9, step=4, seed=1), draw_latents(rows, 9, step=4, seed=1))
    assert not torch.equal(draw_latents(rows, 9, step=4, seed=1), draw_latents(rows, 9, step=5, seed=1))
    assert not torch.equal(draw_latents(rows, 9, step=4, seed=1), draw_latents(rows, 9, step=4, seed=2))


def test_state_goes_through_a_checkpoint_and_continues_alike():
    def continued(usage, quantizer, latents):
        for step in range(3, 9):
            indices = quantizer(latents[step]).info.indices
            usage.update(quantizer, latents[step], indices, step=step, seed=0)
        return quantizer.embedding.weight

    torch.manual_seed(0)
    latents = torch.randn(9, 1, 3, 4, 4)
    usage, quantizer = CodebookUsage(32, decay=0.5), VectorQuantizer(32, 3)
    for step in range(3):
        usage.update(quantizer, latents[step], quantizer(latents[step]).info.indices, step=step, seed=0)
    restored, twin = CodebookUsage(32, decay=0.5), VectorQuantizer(32, 3)
    restored.load_state_dict(usage.state_dict())
    twin.load_state_dict(quantizer.state_dict())
    assert torch.equal(continued(usage, quantizer, latents), continued(restored, twin, latents))


def latents_of_rank(rank, step):
    """Latents that tell where they come from: those of rank r lie around 10 r. The ranks' batches differ in size."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    return 10 * rank + torch.randn(1 + rank, 3, 8, 8, generator=generator)


def run_rank(rank, world_size, folder, steps):
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    torch.manual_seed(0)  # networks start alike, as DDP sees to
    quantizer, usage = VectorQuantizer(64, 3), CodebookUsage(64, init_step=1, decay=0.5, max_replaced=8)
    history = []
    for step in range(steps):
        latents = latents_of_rank(rank, step)
        usage.update(quantizer, latents, quantizer(latents).info.indices, step=step, seed=0)
        history.append({"codes": quantizer.embedding.weight.detach().clone(), "usage": usage.usage.clone()})
    torch.save(history, os.path.join(folder, f"rank{rank}.pt"))
    dist.destroy_process_group()


def test_two_ranks_end_with_the_same_codebook(tmp_path):
    mp.spawn(run_rank, args=(2, str(tmp_path), 8), nprocs=2)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a["codes"], b["codes"])
        assert torch.equal(a["usage"], b["usage"])
    drawn = first[1]["codes"].mean(1)
    assert (drawn < 5).sum() == (drawn > 5).sum() == 32  # half from each rank
    assert not torch.equal(first[1]["codes"], first[-1]["codes"])  # some were replaced

    # The usage is that of all latents together, whatever rank they were on.
    torch.manual_seed(0)
    quantizer, usage = VectorQuantizer(64, 3), CodebookUsage(64, init_step=1, decay=0.5)
    together = torch.cat([latents_of_rank(rank, 0) for rank in range(2)])
    usage.update(quantizer, together, quantizer(together).info.indices, step=0, seed=0)
    assert torch.equal(usage.usage, first[0]["usage"])

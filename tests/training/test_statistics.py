"""Metrics beside the loss: what they are must follow from what was trained, whatever the batches and the ranks."""

import math
from types import SimpleNamespace

import pytest
import torch

from ldm_lab.training.callbacks.codebook_use import HEIGHT, histogram
from ldm_lab.training.callbacks.device_use import DeviceUse
from ldm_lab.training.callbacks.latent_statistics import LatentStatistics
from ldm_lab.training.callbacks.loss_by_timestep import LossByTimestep
from ldm_lab.training.callbacks.not_finite import NotFinite
from tests.trained import metrics, train
from tests.training.stages import tiny

GAN = {"discriminator", "generator", "d_weight", "factor", "logits_real", "logits_fake", "grad_norm"}


# --- by timestep


def validate(callback, losses, timesteps, latents, sizes, ranks=1):
    """What a callback logs of held-out images that come in batches of such sizes, dealt to so many ranks."""
    logged, rows = {}, []
    module = SimpleNamespace(
        device="cpu", scheduler=range(1000), log=lambda name, value, **_: logged.update({name: value})
    )
    for rank in range(ranks):
        callback.on_validation_start(None, module)
        places, start = list(range(rank, len(losses), ranks)), 0
        for size in sizes:
            mine = places[start : start + size]
            outputs = {"losses": losses[mine], "latents": latents[mine]}
            callback.on_validation_batch_end(None, module, outputs, {"timestep": timesteps[mine]}, 0, 0)
            other = {"losses": losses[mine] + 7, "latents": latents[mine] + 7}
            callback.on_validation_batch_end(None, module, other, {"timestep": timesteps[mine]}, 0, 1)
            start += size
        rows.append(torch.stack(callback.rows))
    strategy = SimpleNamespace(all_gather=lambda own: torch.stack(rows) if ranks > 1 else own)
    callback.on_validation_epoch_end(SimpleNamespace(strategy=strategy), module)
    return logged


@pytest.mark.parametrize(("sizes", "ranks"), [([24], 1), ([5, 5, 14], 1), ([7, 5], 2), ([1] * 8, 3)])
def test_losses_and_latents_are_those_of_all_held_out_images(sizes, ranks):
    generator = torch.Generator().manual_seed(0)
    losses = torch.rand(24, generator=generator)
    latents = 3 + 2 * torch.randn(24, 3, 4, 4, generator=generator)
    timesteps = torch.cat([torch.arange(20, 1000, 50), torch.tensor([0, 99, 100, 999])])  # two a tenth, and the edges
    found = validate(LossByTimestep(), losses, timesteps, latents, sizes, ranks)
    assert list(found) == [f"val/loss_t{part}" for part in range(10)]
    for part in range(10):
        there = (timesteps >= 100 * part) & (timesteps < 100 * (part + 1))
        assert found[f"val/loss_t{part}"] == pytest.approx(losses[there].mean().item(), rel=1e-6)
    found = validate(LatentStatistics(), losses, timesteps, latents, sizes, ranks)
    expected = {"val/latent_mean": latents.mean().item(), "val/latent_std": latents.std(correction=0).item()}
    assert found == pytest.approx(expected, rel=1e-6)


def test_a_tenth_without_an_image_is_left_out():
    losses, timesteps = torch.tensor([1.0, 2.0]), torch.tensor([250, 750])
    found = validate(LossByTimestep(), losses, timesteps, losses.view(2, 1, 1, 1), [2])
    assert found == {"val/loss_t2": 1.0, "val/loss_t7": 2.0}


def test_a_run_logs_them_of_its_validation(tiny_runs):
    """The tenths together are the loss; latents whose scale was measured are of unit scale."""
    for run, measured in (("avatars", True), ("celebahq", False)):
        rows = metrics(tiny_runs / run / "diffusion")
        for images in (32, 64):
            parts = [value for name, value in rows[images].items() if name.startswith("val/loss_t")]
            assert len(parts) == 10
            assert min(parts) <= rows[images]["val/loss"] <= max(parts)
            assert (abs(rows[images]["val/latent_std"] - 1) < 0.2) is measured


# --- in training


def test_what_the_two_players_do_stands_apart(tiny_runs):
    for run, adversary in (("celebahq", True), ("avatars", False)):
        rows = metrics(tiny_runs / run / "autoencoder")
        names = {name for row in rows.values() for name in row}
        players = {name.removeprefix("disc/") for name in names if name.startswith("disc/")}
        assert players == (GAN if adversary else set())
        own = {name.removeprefix("train/") for name in names if name.startswith("train/")}
        assert own & GAN == {"grad_norm"}
        assert all(row["train/grad_norm"] > 0 for row in rows.values())


def test_the_norm_of_the_gradient_is_that_before_clipping(tiny_runs, tmp_path):
    """Also where a step is made of several batches. What is clipped to next to nothing has the norm that it had."""
    command = ["experiment=celebahq/diffusion", f"autoencoder={tiny_runs}/celebahq", "max_images=8"]
    found = []
    for name, more in {"whole": [], "parts": ["data.batch_size=2", "trainer.gradient_clip_val=1e-6"]}.items():
        train(tmp_path, *command, *more, f"name={name}", "callbacks=none")
        found.append(metrics(tmp_path / name / "diffusion")[8]["train/grad_norm"])
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_norms_are_told_apart_by_network():
    module = tiny("celebahq/autoencoder")[0]
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
    logged, check = {}, NotFinite("nowhere")
    module.log = lambda name, value, **_: logged.update({name: float(value)})
    trainer = SimpleNamespace(
        world_size=1, on_nan="stop", precision_plugin=None, global_step=0, max_steps=9, callbacks=[],
        datamodule=SimpleNamespace(global_batch_size=8),
    )  # fmt: skip
    check._step.losses.append(torch.tensor(0.0))
    check.on_before_optimizer_step(trainer, module, None)
    check.on_train_batch_end(trainer, module, None, None, 0)
    networks = {"train/grad_norm": module.autoencoder, "disc/grad_norm": module.loss.discriminator}
    for name, network in networks.items():
        squares = sum(p.grad.double().square().sum() for p in network.parameters() if p.grad is not None)
        assert logged[name] == pytest.approx(math.sqrt(squares), rel=1e-4)


# --- memory and time


def test_device_hours_add_up_over_starts_and_devices(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr("ldm_lab.training.planning.memory.reset_peak", lambda device: None)
    logged = {}
    module = SimpleNamespace(device=torch.device("cpu"), log=lambda name, value, **_: logged.update({name: value}))
    first, second = DeviceUse(), DeviceUse()
    first.on_train_start(SimpleNamespace(world_size=4), module)
    now[0] += 1800
    state = first.state_dict()
    now[0] += 500  # after the checkpoint: this start is lost
    second.on_validation_epoch_end(SimpleNamespace(world_size=1), module)  # which the first start owes
    assert logged.keys() == {"perf/memory_gb"}
    second.load_state_dict(state)
    second.on_train_start(SimpleNamespace(world_size=1), module)
    now[0] += 3600
    second.on_train_batch_end(None, module)
    assert logged["perf/device_hours"] == 3.0
    assert 0.01 < logged["perf/memory_gb"] < 100


def test_they_stand_beside_the_metrics_of_each_validation(tiny_runs):
    for stage in ("autoencoder", "diffusion"):
        rows = metrics(tiny_runs / "celebahq" / stage)
        hours = [row["perf/device_hours"] for row in rows.values()]
        assert hours == sorted(hours)
        assert 0 < hours[0] < hours[-1] < 1
        assert {images for images, row in rows.items() if "perf/memory_gb" in row} == {32, 64}


# --- the histogram of the codes


def test_the_histogram_shows_how_often_codes_are_used():
    even = histogram(torch.full((16,), 5.0), bars=256)
    assert even.shape == (3, HEIGHT, 256)
    assert heights(even) == [HEIGHT // 2] * 16
    counts = torch.tensor([0.0, 1.0, 0.0, 31.0] + 12 * [0.0])  # of 2 on average
    expected = [round(HEIGHT * (math.log10(use) / 2 + 1) / 2 - 0.5) for use in (15.5, 0.5)]
    assert heights(histogram(counts, bars=256)) == [*expected, *14 * [0]]
    assert histogram(torch.arange(1000.0), bars=100).shape[-1] == 200
    assert histogram(counts, 256).abs().max() <= 1


def heights(picture, bars=16):
    """Pixels of colour in each bar, above the lowest row; the grey line left out."""
    coloured = (picture[2] > picture[0]) & (picture[0] < 1)  # (H, W)
    coloured[HEIGHT // 2] = coloured[HEIGHT // 2 + 1]
    return coloured[:, :: picture.shape[-1] // bars].sum(0).tolist()

"""`python -m ldm_lab samplers`: distances to the solution, on a tiny pipeline and on a network that is known."""

import csv
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ldm_lab.diffusion.ddim import DDIMScheduler
from ldm_lab.pipeline import LDMPipeline
from ldm_lab.tools import samplers
from ldm_lab.tools.samplers import VARIANTS, main, measure
from ldm_lab.utils import randomness
from tests.helpers import GOLDEN

MODEL = GOLDEN / "diffusers" / "ldm_tiny"
LATENTS = {"beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195, "clip_sample": False}


class Perfect(nn.Module):
    """What the best network says of data that is N(0, 0.3): the solution is a multiple of the noise."""

    config = SimpleNamespace(in_channels=2, out_channels=2, sample_size=3)
    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, scheduler):
        super().__init__()
        self.alphas_cumprod = scheduler.alphas_cumprod.double()

    def forward(self, x, t):
        alpha_bar = float(self.alphas_cumprod[t])
        return SimpleNamespace(sample=math.sqrt(1 - alpha_bar) * x / (alpha_bar * 0.3 + 1 - alpha_bar))


def perfect(**settings):
    scheduler = DDIMScheduler(**LATENTS, **settings)
    return LDMPipeline(SimpleNamespace(embed_dim=2), Perfect(scheduler), scheduler)


def test_distances_are_those_to_the_analytic_solution():
    pipe = perfect()
    alpha_bar = float(pipe.scheduler.alphas_cumprod[-1])
    exact = math.sqrt(0.3 / (alpha_bar * 0.3 + 1 - alpha_bar))  # what the ODE multiplies the noise by
    noise = torch.stack([torch.randn(2, 3, 3, generator=randomness.generator(0, "sample", i)) for i in range(3)])
    rows = list(measure(pipe, list(VARIANTS), [20, 200], seeds=3, reference=1000))
    assert [row[:2] for row in rows] == [(name, steps) for name in VARIANTS for steps in (20, 200)]
    for row in rows:
        drawn = samplers.latents(pipe, samplers.variant(pipe.scheduler, row.sampler), row.evaluations, 3)
        assert row.distance == pytest.approx(float((drawn - exact * noise).norm() / (exact * noise).norm()), abs=5e-3)
        assert row.mean_of_images == pytest.approx(row.distance, rel=1e-3, abs=1e-5)  # all is linear
    for (_, _, few, _), (_, _, many, _) in zip(rows[::2], rows[1::2], strict=True):
        assert many < few / 4 < 0.05


def test_images_count_alike_in_the_mean_and_by_their_size_in_the_whole(monkeypatch):
    drawn = [[[3.0, 4.0], [0.0, 0.5]], [[3.0, 4.5], [0.0, 0.75]]]  # the solution, and what is 0.1 and 0.5 off
    monkeypatch.setattr(samplers, "latents", lambda *_: torch.tensor(drawn.pop(0)))
    (row,) = measure(perfect(), ["ddim"], [5], seeds=2, reference=1000)
    assert row.mean_of_images == pytest.approx(0.3)
    assert row.distance == pytest.approx(math.sqrt((0.5**2 + 0.25**2) / (25 + 0.25)))


def test_all_end_at_a_clean_sample():
    pipe = perfect(set_alpha_to_one=False, steps_offset=1)
    ends = [samplers.variant(pipe.scheduler, name).final_alpha_cumprod for name in VARIANTS]
    assert ends == [1.0] * len(VARIANTS)
    for row in measure(pipe, list(VARIANTS), [200], seeds=1, reference=1000):
        assert row.distance < 0.03


def test_the_table_is_printed_and_written(tmp_path, capsys):
    table = tmp_path / "table.csv"
    flags = [
        "--seeds",
        "2",
        "--steps",
        "2,4",
        "--reference",
        "8",
        "--sampler",
        "dpm_solver,ddim",
        "--output",
        str(table),
    ]
    main([str(MODEL), *flags])
    title, header, *printed = capsys.readouterr().out.splitlines()
    assert title == "2 images; the solution: DPM-Solver++ 2M with 8 steps"
    assert header.split()[:2] == ["sampler", "evaluations"]
    with open(table, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["sampler", "evaluations", "distance", "mean_of_images"]
    assert [(row["sampler"], row["evaluations"]) for row in rows] == [
        ("dpm_solver", "2"), ("dpm_solver", "4"), ("ddim", "2"), ("ddim", "4"),
    ]  # fmt: skip
    for row, line in zip(rows, printed, strict=True):
        assert [f"{float(row[key]):.4f}" for key in ("distance", "mean_of_images")] == line.split()[2:]
        assert float(row["distance"]) > 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps", "5,x"], r"^--steps 5,x: must be numbers of evaluations"),
        (["--steps", "0"], r"^--steps 0: must be"),
        (["--steps", "5,1001"], r"^num_inference_steps=1001 "),
        (["--sampler", "euler"], r"^--sampler euler; there are ddim, ddim_trailing"),
        (["--sampler", "ddim,ddpm"], r"^--sampler ddpm: its steps draw noise"),
        (["--seeds", "0"], r"^--seeds 0: must be at least 1$"),
        (["--reference", "-1"], r"^--reference -1: must be"),
        (["--reference", "2000"], r"^num_inference_steps=2000 "),
        (
            ["--output", "nowhere/table.csv"],
            r"^--output nowhere/table.csv: must be a new file in a folder that is there$",
        ),
        (["--output", __file__], r"must be a new file"),
    ],
)
def test_flags_that_cannot_be_are_refused_before_anything_is_drawn(flags, message, monkeypatch):
    monkeypatch.setattr(samplers, "latents", lambda *_: pytest.fail("drawn"))
    with pytest.raises(ValueError, match=message) as error:
        main([str(MODEL), *flags])
    assert "\n" not in str(error.value)

"""The lists of timesteps that sampling visits."""

import pytest
import torch

from ldm_lab.diffusion.ddim import DDIMScheduler
from ldm_lab.diffusion.ddpm import DDPMScheduler
from ldm_lab.diffusion.dpm_solver import DPMSolverMultistepScheduler
from ldm_lab.diffusion.spacing import SPACINGS, evenly
from tests.diffusion.golden import diffusers_meta

SCHEDULERS = pytest.mark.parametrize(
    "scheduler_class", [DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler], ids=lambda kind: kind.__name__
)


@SCHEDULERS
@pytest.mark.parametrize("spacing", SPACINGS)
def test_n_steps_asked_are_n_steps_done(spacing, scheduler_class):
    scheduler = scheduler_class(timestep_spacing=spacing)
    for count in range(1, 1001):
        scheduler.set_timesteps(count)
        timesteps = scheduler.timesteps
        assert timesteps.shape == (count,)
        assert timesteps.dtype == torch.int64
        assert scheduler.num_inference_steps == count
        assert (timesteps.diff() < 0).all()
        assert 0 <= timesteps[-1] <= timesteps[0] <= 999
        assert spacing == "leading" or timesteps[0] == 999 or (spacing, count) == ("linspace", 1)


def test_timestep_tables_of_diffusers():
    compared = 0
    for table in diffusers_meta()["timestep_tables"]:
        scheduler = DDIMScheduler(timestep_spacing=table["spacing"], steps_offset=table["steps_offset"])
        if not table["in_range"]:
            with pytest.raises(ValueError, match="steps_offset=1"):
                scheduler.set_timesteps(table["n"])
            continue
        scheduler.set_timesteps(table["n"])
        ours = scheduler.timesteps.tolist()
        assert len(ours) == table["n"]
        if len(ours) == table["length"]:
            compared += 1
            assert sum(ours) == table["sum"]
            assert ours[:3] == table["head"]
            assert ours == (table["timesteps"] or ours)
    assert compared > 50


@pytest.mark.parametrize("spacing", SPACINGS)
def test_every_list_equals_that_of_diffusers_where_that_has_n_steps(spacing):
    diffusers = pytest.importorskip("diffusers")
    ours, theirs = DDIMScheduler(timestep_spacing=spacing), diffusers.DDIMScheduler(timestep_spacing=spacing)
    different = []
    for count in range(1, 1001):
        ours.set_timesteps(count)
        theirs.set_timesteps(count)
        if len(theirs.timesteps) != count:
            different.append(count)
        else:
            assert torch.equal(ours.timesteps, theirs.timesteps), count
    assert len(different) == (62 if spacing == "trailing" else 0)


@SCHEDULERS
def test_own_list_of_timesteps(scheduler_class):
    scheduler = scheduler_class()
    scheduler.set_timesteps(timesteps=torch.tensor([999, 500, 3]))
    assert scheduler.timesteps.tolist() == [999, 500, 3]
    assert scheduler.num_inference_steps == 3
    assert [scheduler.previous_timestep(t) for t in scheduler.timesteps] == [500, 3, -1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps=0"),
        ({"num_inference_steps": 1001}, r"num_inference_steps=1001 .* within 1\.\.1000"),
        ({"num_inference_steps": 2.5}, "num_inference_steps=2.5"),
        ({}, "either num_inference_steps or timesteps"),
        ({"num_inference_steps": 2, "timesteps": [1, 0]}, "either num_inference_steps or timesteps"),
        ({"timesteps": []}, r"timesteps=\[\]"),
        ({"timesteps": [1, 1, 0]}, "a falling sequence"),
        ({"timesteps": [1000, 0]}, r"within 0\.\.999"),
        ({"timesteps": [5.5, 1]}, "timestep=5.5 is not one whole number"),
        ({"timesteps": [5, -1]}, r"within 0\.\.999"),
    ],
)
@SCHEDULERS
def test_timesteps_that_cannot_be(scheduler_class, arguments, message):
    with pytest.raises(ValueError, match=message):
        scheduler_class().set_timesteps(**arguments)


@pytest.mark.parametrize("total", [10, 1000])
@pytest.mark.parametrize(
    "curve", [lambda t: t, lambda t: -t, lambda t: t**3, lambda t: 1e-9 ** (1 - t), lambda t: (2 * t - 1) ** 3]
)
def test_even_values_are_n_timesteps_for_every_n(curve, total):
    values = [float(curve(t / (total - 1))) for t in range(total)]
    for steps in range(1, total + 1, max(1, total // 40)):
        chosen = evenly(steps, values)
        assert len(chosen) == steps
        assert chosen == sorted(set(chosen), reverse=True)
        assert chosen[0] == total - 1
        assert chosen[-1] == 0 or steps == 1


def test_even_values_are_the_nearest_that_there_are():
    cubes = [t**3 for t in range(101)]
    assert evenly(5, cubes) == [100, 91, 79, 63, 0]  # 100 times the cube roots of 1, 3/4, 1/2, 1/4, 0

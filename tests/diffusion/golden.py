"""The recorded outputs that the tests of this folder compare with."""

import functools
import json

from safetensors.torch import load_file

from tests.helpers import GOLDEN

# What CompVis's own DDIM is in our terms (its published celebahq schedule).
COMPVIS = {
    "beta_start": 0.0015,
    "beta_end": 0.0195,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


@functools.cache
def compvis(name):
    return load_file(GOLDEN / "compvis" / f"{name}.safetensors")


@functools.cache
def compvis_meta():
    return json.loads((GOLDEN / "compvis" / "meta.json").read_text())


def recorded_schedule():
    """The schedule of the networks whose outputs were recorded; that of `schedule.safetensors` is celebahq's."""
    schedule = compvis_meta()["schedule"]
    betas = {"beta_start": schedule["linear_start"], "beta_end": schedule["linear_end"]}
    return {**COMPVIS, **betas, "num_train_timesteps": schedule["timesteps"]}


@functools.cache
def diffusers_tensors():
    return load_file(GOLDEN / "diffusers" / "golden.safetensors")


@functools.cache
def diffusers_meta():
    return json.loads((GOLDEN / "diffusers" / "golden.json").read_text())

"""Settings: their names and defaults, their file, and what is refused."""

import copy
import inspect
import json
import pickle

import pytest
import torch

from ldm_lab.diffusion.ddim import DDIMScheduler
from ldm_lab.diffusion.ddpm import DDPMScheduler
from ldm_lab.untrusted import LoadError
from tests.diffusion.golden import COMPVIS, diffusers_meta
from tests.helpers import GOLDEN

BOTH = pytest.mark.parametrize("scheduler_class", [DDIMScheduler, DDPMScheduler])


@BOTH
def test_config_round_trip(scheduler_class, tmp_path):
    scheduler = scheduler_class(num_train_timesteps=3, trained_betas=[0.1, 0.2, 0.3], prediction_type="sample")
    scheduler.save_pretrained(tmp_path / "scheduler")
    written = json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text())
    assert written["_class_name"] == scheduler_class.__name__
    again = scheduler_class.from_pretrained(tmp_path, subfolder="scheduler")
    assert again.config == scheduler.config
    assert torch.equal(again.alphas_cumprod, scheduler.alphas_cumprod)
    assert len(again) == 3


@pytest.mark.parametrize("folder", ["ldm_tiny", "ldm_tiny_legacy"])
def test_folders_of_diffusers_load(folder):
    scheduler = DDIMScheduler.from_pretrained(GOLDEN / "diffusers" / folder, subfolder="scheduler")
    assert scheduler.config.beta_schedule == "scaled_linear"
    assert scheduler.config.clip_sample is False
    expected = DDIMScheduler.from_config(diffusers_meta()["scheduler"])
    assert torch.equal(scheduler.alphas_cumprod, expected.alphas_cumprod)


@BOTH
def test_diffusers_reads_our_config_and_we_read_its(scheduler_class, tmp_path):
    theirs_class = getattr(pytest.importorskip("diffusers"), scheduler_class.__name__)
    ours = scheduler_class(beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing", clip_sample=False)
    ours.save_pretrained(tmp_path)
    theirs = theirs_class.from_pretrained(tmp_path)
    assert {key: theirs.config[key] for key in ours.config} == ours.config
    theirs.save_pretrained(tmp_path)
    assert scheduler_class.from_pretrained(tmp_path).config == ours.config


def test_one_scheduler_is_built_from_the_config_of_another():
    ddim = DDIMScheduler(**COMPVIS)
    ddpm = DDPMScheduler.from_config(ddim.config, variance_type="fixed_large")
    assert ddpm.config.beta_end == 0.0195
    assert torch.equal(ddpm.alphas_cumprod, ddim.alphas_cumprod)


def test_a_damaged_config_is_named(tmp_path):
    path = tmp_path / "scheduler_config.json"
    with pytest.raises(LoadError, match="no such file"):
        DDIMScheduler.from_pretrained(tmp_path)
    path.write_text('{"beta_schedule": "exponential"}')
    with pytest.raises(LoadError, match=r"scheduler_config.json: beta_schedule='exponential'"):
        DDIMScheduler.from_pretrained(tmp_path)


@BOTH
def test_signatures_are_those_of_diffusers_and_more(scheduler_class):
    theirs_class = getattr(pytest.importorskip("diffusers"), scheduler_class.__name__)
    for method in ("__init__", "step", "set_timesteps", "add_noise", "get_velocity", "scale_model_input"):
        ours = inspect.signature(getattr(scheduler_class, method)).parameters
        theirs = inspect.signature(getattr(theirs_class, method)).parameters
        assert list(ours)[: len(theirs)] == list(theirs), method
        for name, parameter in theirs.items():
            if parameter.default is not inspect.Parameter.empty:
                assert ours[name].default == parameter.default, (method, name)
        for name in list(ours)[len(theirs) :]:
            assert ours[name].default is None, (method, name)


@BOTH
def test_starts_like_the_one_of_diffusers(scheduler_class):
    theirs = getattr(pytest.importorskip("diffusers"), scheduler_class.__name__)()
    ours = scheduler_class()
    assert len(ours) == len(theirs) == 1000
    assert torch.equal(ours.timesteps, theirs.timesteps)
    assert ours.num_inference_steps is theirs.num_inference_steps is None
    assert ours.init_noise_sigma == theirs.init_noise_sigma
    x = torch.randn(2)
    assert ours.scale_model_input(x, 3) is x


@BOTH
def test_copies_and_pickles(scheduler_class):
    scheduler = scheduler_class(prediction_type="v_prediction")
    scheduler.set_timesteps(7)
    for twin in (copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))):
        assert twin.config == scheduler.config
        assert twin.previous_timestep(142) == 0


@BOTH
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("prediction_type", "eps"),
        ("timestep_spacing", "karras"),
        ("steps_offset", -1),
        ("steps_offset", 0.5),
        ("clip_sample", "false"),
        ("clip_sample_range", 0.0),
        ("thresholding", 1),
        ("dynamic_thresholding_ratio", 1.5),
        ("sample_max_value", 0.5),
    ],
)
def test_a_wrong_setting_is_named(scheduler_class, key, value):
    with pytest.raises(ValueError, match=f"{key}={value!r} is not allowed"):
        scheduler_class(**{key: value})

"""Settings: their names and defaults, their file, and what is refused."""

import copy
import inspect
import json
import logging
import pickle

import numpy as np
import pytest
import torch

from ldm_lab.diffusion.ddim import DDIMScheduler
from ldm_lab.diffusion.ddpm import DDPMScheduler
from ldm_lab.diffusion.dpm_solver import DPMSolverMultistepScheduler
from ldm_lab.diffusion.flow import is_flow
from ldm_lab.diffusion.samplers import SAMPLERS
from ldm_lab.utils.reading import LoadError
from ldm_lab.utils.terminal import said_once
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
        ("sample_max_value", 0.0),
    ],
)
def test_a_wrong_setting_is_named(scheduler_class, key, value):
    with pytest.raises(ValueError, match=f"{key}={value!r} is not (allowed|supported)"):
        scheduler_class(**{key: value})


DIFFUSIONS = {name: kind for name, kind in SAMPLERS.items() if not is_flow(kind)}
ALL = pytest.mark.parametrize("scheduler_class", DIFFUSIONS.values(), ids=DIFFUSIONS)


@ALL
def test_trained_betas_say_how_many_timesteps_there_are(scheduler_class, tmp_path):
    betas = [0.01, 0.02, 0.03, 0.05]
    for given in (betas, np.array(betas), torch.tensor(betas, dtype=torch.float64)):
        scheduler = scheduler_class(trained_betas=given)
        assert len(scheduler) == len(scheduler.alphas_cumprod) == scheduler.config.num_train_timesteps == 4
        assert scheduler.timesteps.tolist() == [3, 2, 1, 0]
        scheduler.set_timesteps(4)
        assert scheduler.timesteps.tolist() == [3, 2, 1, 0]
    scheduler.save_pretrained(tmp_path)
    again = scheduler_class.from_pretrained(tmp_path)
    assert again.betas.tolist() == scheduler.betas.tolist()
    theirs = getattr(pytest.importorskip("diffusers"), scheduler_class.__name__).from_pretrained(tmp_path)
    assert torch.equal(theirs.timesteps.long(), torch.tensor([3, 2, 1, 0]))


@ALL
def test_files_are_those_of_the_namesake(scheduler_class, tmp_path):
    theirs_class = getattr(pytest.importorskip("diffusers"), scheduler_class.__name__)
    theirs_class(beta_end=0.03, timestep_spacing="trailing").save_pretrained(tmp_path / "theirs")
    ours = scheduler_class.from_pretrained(tmp_path / "theirs", prediction_type="sample")
    assert (ours.config.beta_end, ours.config.timestep_spacing) == (0.03, "trailing")
    assert ours.config.prediction_type == "sample"
    ours.save_pretrained(tmp_path / "ours")
    theirs = theirs_class.from_pretrained(tmp_path / "ours")
    for key in inspect.signature(scheduler_class.__init__).parameters.keys() - {"self"}:
        assert theirs.config[key] == ours.config[key], key


@ALL
def test_what_a_scheduler_was_not_given_the_next_one_has_at_its_own_default(scheduler_class):
    first, given = DDIMScheduler(beta_end=0.03), DDIMScheduler(beta_end=0.03, timestep_spacing="leading")
    for config in (first.config, copy.deepcopy(first.config), pickle.loads(pickle.dumps(first.config))):
        second = scheduler_class.from_config(config)
        assert second.config.beta_end == 0.03
        assert second.config.timestep_spacing == scheduler_class().config.timestep_spacing
    assert scheduler_class.from_config(given.config).config.timestep_spacing == "leading"
    first.register_to_config(timestep_spacing="trailing")
    assert scheduler_class.from_config(first.config).config.timestep_spacing == "trailing"
    assert scheduler_class.from_config(first.config, timestep_spacing="leading").config.timestep_spacing == "leading"


def test_a_scheduler_of_diffusers_has_its_own_defaults_too():
    diffusers = pytest.importorskip("diffusers")
    for settings in ({}, {"timestep_spacing": "leading"}):
        ours, theirs = DDIMScheduler(**settings), diffusers.DDIMScheduler(**settings)
        spacings = [
            diffusers.EulerDiscreteScheduler.from_config(each.config).config.timestep_spacing for each in (ours, theirs)
        ]
        assert spacings[0] == spacings[1]


def test_settings_that_a_scheduler_does_not_have_survive_it():
    """Or the latents would be clipped by the sampler after the next."""
    model = DDIMScheduler(clip_sample=False, set_alpha_to_one=False)
    solver = DPMSolverMultistepScheduler.from_config(model.config, solver_order=3)
    back = DDIMScheduler.from_config(solver.config)
    assert {key: back.config[key] for key in model.config} == model.config
    assert DPMSolverMultistepScheduler.from_config(back.config).config.solver_order == 3
    clipping = DPMSolverMultistepScheduler.from_config(DDIMScheduler(clip_sample=True).config)
    clipping.set_timesteps(5)
    x = torch.full((1, 3), 30.0)
    assert clipping.step(0 * x, 999, x).pred_original_sample.abs().max() > 1  # the solver has no such setting


def test_a_setting_that_no_scheduler_has_is_named(caplog):
    said_once.clear()
    with caplog.at_level(logging.WARNING):
        DDIMScheduler.from_config({"beta_strat": 0.1, "rho": 7.0, "solver_order": 2, "_diffusers_version": "0.42.1"})
    assert [record.getMessage() for record in caplog.records] == [
        "DDIMScheduler ignores the settings beta_strat of its config: no scheduler has them"
    ]


@ALL
def test_the_settings_of_every_scheduler_of_diffusers_pass_in_silence(scheduler_class, caplog):
    diffusers = pytest.importorskip("diffusers")
    said_once.clear()
    for kind in diffusers.schedulers.KarrasDiffusionSchedulers:
        theirs = getattr(diffusers, kind.name)
        settings = inspect.signature(theirs.__init__).parameters.values()
        config = {each.name: each.default for each in settings if each.default is not each.empty}
        config |= {"algorithm_type": "dpmsolver++", "sigma_schedule": "karras", "final_sigmas_type": "zero"}
        scheduler_class.from_config({key: value for key, value in config.items() if key != "prediction_type"})
    assert not caplog.records


@ALL
def test_its_kin_are_built_from_its_config(scheduler_class):
    scheduler = scheduler_class(beta_end=0.03)
    assert scheduler_class in scheduler.compatibles
    assert scheduler.order == 1
    for kind in scheduler.compatibles:
        assert torch.equal(kind.from_config(scheduler.config).betas, scheduler.betas)

"""The defects of the namesakes in diffusers, and of CompVis's DDIM: a test each that ours have none of them.

Each docstring says what goes wrong there. Where diffusers is installed, the second half of the test shows it; it is
skipped where a later version has mended it. What other tests show already is listed in ELSEWHERE.
"""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm_lab import DDIMScheduler, DPMSolverMultistepScheduler, LDMPipeline, VQModel
from ldm_lab.utils.reading import LoadError
from tests.diffusion.golden import COMPVIS, compvis, compvis_meta

TESTS = Path(__file__).parent
FOLDER = TESTS / "golden" / "diffusers" / "ldm_tiny"
LATENTS = {"beta_schedule": "scaled_linear", "clip_sample": False}

ELSEWHERE = {
    # LDMPipeline
    "there is neither latents= nor callback=": "pipeline/test_pipeline_recorded.py::test_trajectories",
    "there are no outputs of type pt and latent": "pipeline/test_pipeline.py::test_output_types",
    "a VQ folder without scaling_factor is decoded to garbage": (
        "pipeline/test_pipeline_folders.py::test_a_foreign_autoencoder_without_the_key_is_not_scaled"
    ),
    "the converters of CompVis checkpoints do not run": (
        "checkpoints/test_compvis_checkpoint.py::test_prediction_and_ddim"
    ),
    # Schedulers
    "order 3 of the SDE does not converge: a sign in its last weight": (
        "diffusion/test_dpm_solver.py::test_more_steps_of_the_sde_come_closer_to_the_variance_of_the_data"
    ),
    "the DPM-Solver takes 2^-24 for a zero SNR": (
        "diffusion/test_dpm_solver.py::test_pure_noise_at_the_start_is_taken_exactly"
    ),
    # VQModel
    "beta stands before the wrong term of the loss, without a choice": (
        "checkpoints/test_compvis.py::test_encoder_and_quantizer"
    ),
    # CompVis
    "the generator advances although eta is 0": "diffusion/test_ddim.py::test_without_eta_nothing_is_drawn",
}


def test_what_is_shown_elsewhere_is_there():
    for place in ELSEWHERE.values():
        path, name = place.split("::")
        assert f"def {name}(" in (TESTS / path).read_text(encoding="utf-8"), place


def load(kind=LDMPipeline, **options):
    pipe = kind.from_pretrained(FOLDER, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def diffusers(name):
    return getattr(pytest.importorskip("diffusers"), name)


def theirs(**options):
    return load(diffusers("LDMPipeline"), **options)


def draw(pipe, seed=0, **options):
    usual = {"generator": torch.Generator().manual_seed(seed), "num_inference_steps": 2, "output_type": "np"}
    return torch.as_tensor(pipe(**(usual | options))[0])


def error(call, *args, **kwargs):
    """What kind of exception a call ends with, if any."""
    try:
        call(*args, **kwargs)
    except Exception as caught:
        return type(caught)
    return None


def refused(message, call, *args, **kwargs):
    """Ends with a `ValueError` of one line that says so."""
    with pytest.raises(ValueError, match=message) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)


def still(there):
    if not there:
        pytest.skip("mended in this version of diffusers")


# LDMPipeline


def test_the_generator_governs_the_noise_of_eta():
    """With eta > 0 the same seed gives another image each time."""
    assert torch.equal(*(draw(load(), eta=1.0) for _ in range(2)))
    still(not torch.equal(*(draw(theirs(), eta=1.0) for _ in range(2))))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype):
    """A pipeline in half precision fails in its first convolution."""
    assert draw(load(torch_dtype=dtype)).isfinite().all()
    still(error(draw, theirs(dtype=dtype)) is RuntimeError)


@pytest.mark.parametrize("output_type", ["nonsense", "tensor", None])
def test_an_unknown_output_type(output_type):
    """Whatever is not "pil" gives arrays."""
    refused("output_type", draw, load(), output_type=output_type)
    still(error(draw, theirs(), output_type=output_type) is None)


@pytest.mark.parametrize("argument", ["negative_prompt", "callback_on_step_end", "num_inference_step"])
def test_an_unknown_argument(argument):
    """Arguments that it does not know, and misspelt ones, are ignored."""
    assert error(draw, load(), **{argument: 1}) is TypeError
    still(error(draw, theirs(), **{argument: 1}) is None)


def test_a_size_that_is_not_square():
    """`sample_size` as (height, width) is a `TypeError`."""

    def wide(pipe):
        pipe.unet.register_to_config(sample_size=(8, 12))
        return pipe

    assert draw(wide(load())).shape == (1, 16, 24, 3)
    still(error(draw, wide(theirs())) is TypeError)


def test_too_few_generators():
    """A list shorter than the batch is a bare `IndexError`."""
    short = {"batch_size": 3, "generator": [torch.Generator(), torch.Generator()]}
    refused("2 given for a batch of 3", draw, load(), **short)
    still(error(draw, theirs(), **short) is IndexError)


@pytest.mark.parametrize("name", ["num_inference_steps", "batch_size"])
def test_none_of_something(name):
    """Zero steps are a division by zero, zero images fail in a reshape."""
    refused(name, draw, load(), **{name: 0})
    still(error(draw, theirs(), **{name: 0}) in (ZeroDivisionError, RuntimeError))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_generator_on_the_gpu():
    """It is refused, although the pipeline is on the GPU."""
    first, again, other = (
        draw(load().to("cuda"), generator=torch.Generator("cuda").manual_seed(seed), eta=1.0) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(again, other)
    still(error(draw, theirs().to("cuda"), generator=torch.Generator("cuda")) is ValueError)


# Networks


def test_a_weight_that_is_missing(tmp_path):
    """A weight of another name is a warning, and random numbers take its place."""
    folder = shutil.copytree(FOLDER, tmp_path / "pipeline")
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    state["conv_end.weight"] = state.pop("conv_out.weight")
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(LoadError, match=r"no tensor 'conv_out\.weight'"):
        LDMPipeline.from_pretrained(folder)
    still(error(diffusers("LDMPipeline").from_pretrained, folder, low_cpu_mem_usage=False) is None)


def test_the_default_scale_of_latents():
    """0.18215 was measured for another autoencoder, of another kind; VQ latents are not scaled."""
    assert VQModel().config.scaling_factor == 1.0
    still(diffusers("VQModel")().config.scaling_factor == 0.18215)


def test_the_use_of_the_codebook():
    """How many codes are used is not told: perplexity is None."""
    latents = torch.randn(1, 3, 4, 4)
    assert 1 <= VQModel().quantize(latents).info.perplexity <= 16
    still(diffusers("VQModel")().quantize(latents)[2][0] is None)


# Schedulers


def test_n_steps_are_n_steps():
    """With "trailing" one step too many, for 62 numbers up to 1000. All numbers and spacings: test_spacing.py."""

    def counts(scheduler):
        for count in (61, 103, 121, 122, 201, 206):
            scheduler.set_timesteps(count)
            yield len(scheduler.timesteps) - count

    assert set(counts(DDIMScheduler(timestep_spacing="trailing"))) == {0}
    still(set(counts(diffusers("DDIMScheduler")(timestep_spacing="trailing"))) == {1})


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
def test_a_step_goes_where_the_next_one_starts(spacing):
    """A step ends at t - T // N, which the list does not hold: exact predictions then do not follow the exact path."""
    x0, noise = torch.full((1, 2), 0.7), torch.randn(1, 2, generator=torch.Generator().manual_seed(0))

    def drift(scheduler):
        scheduler.set_timesteps(7)
        x = scheduler.add_noise(x0, noise, scheduler.timesteps[:1])
        for t, following in zip(scheduler.timesteps, scheduler.timesteps[1:], strict=False):
            x = scheduler.step(noise, t, x)[0]
            exact = scheduler.add_noise(x0, noise, following[None])
            yield (x - exact).abs().max().item()
            x = exact

    settings = {**LATENTS, "timestep_spacing": spacing}
    assert max(drift(DDIMScheduler(**settings))) < 1e-4
    still(max(drift(diffusers("DDIMScheduler")(**settings))) > 1e-3)


def test_an_offset_that_leaves_the_schedule():
    """1000 steps with an offset of 1 begin at timestep 1000: an `IndexError`, in the middle of sampling."""
    refused("steps_offset=1", DDIMScheduler(steps_offset=1).set_timesteps, 1000)
    scheduler, x = diffusers("DDIMScheduler")(steps_offset=1), torch.zeros(1, 2)
    still(error(lambda: scheduler.set_timesteps(1000) or scheduler.step(x, scheduler.timesteps[0], x)) is IndexError)


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
def test_zero_snr_and_epsilon(spacing):
    """x0 is a division by zero: the image is NaN, without an error."""
    settings, x = {**LATENTS, "timestep_spacing": spacing, "rescale_betas_zero_snr": True}, torch.ones(1, 2)
    ours = DDIMScheduler(**settings)
    ours.set_timesteps(10)
    refused("says nothing of x0 at timestep 999", ours.step, x, 999, x)
    namesake = diffusers("DDIMScheduler")(**settings)
    namesake.set_timesteps(10)
    still(not namesake.step(x, 999, x)[0].isfinite().all())


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
def test_zero_snr_and_eta_1(prediction_type):
    """Nothing is left for ε in the first step, and rounding makes it less: often its root is NaN."""
    settings = {**LATENTS, "timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
    settings["prediction_type"] = prediction_type
    x = torch.ones(1, 2)

    def finite(scheduler):
        for count in range(1, 20):
            scheduler.set_timesteps(count)
            yield bool(scheduler.step(x, 999, x, eta=1.0, variance_noise=x)[0].isfinite().all())

    assert all(finite(DDIMScheduler(**settings)))
    still(not all(finite(diffusers("DDIMScheduler")(**settings))))


def test_half_precision_of_the_forward_process():
    """The rates are rounded before they are used: the noise of the first timesteps vanishes."""
    x0, noise, t = torch.zeros(1000, 1), torch.ones(1000, 1), torch.arange(1000)

    def worst(scheduler):
        exact = scheduler.add_noise(x0, noise, t)
        half = scheduler.add_noise(x0.bfloat16(), noise.bfloat16(), t).float()
        return ((half - exact) / exact).abs().max().item()

    assert worst(DDIMScheduler()) <= torch.finfo(torch.bfloat16).eps
    still(worst(diffusers("DDIMScheduler")()) > 0.5)


@pytest.mark.parametrize("spacing", ["linspace", "leading"])
def test_the_dpm_solver_through_all_timesteps(spacing):
    """1000 steps visit one timestep twice, or the same one 1000 times."""

    def visited(scheduler):
        scheduler.set_timesteps(1000)
        return len(set(scheduler.timesteps.tolist()))

    assert visited(DPMSolverMultistepScheduler(timestep_spacing=spacing)) == 1000
    still(visited(diffusers("DPMSolverMultistepScheduler")(timestep_spacing=spacing)) < 1000)


# CompVis's DDIM


def test_the_number_of_steps_of_compvis():
    """Its stride is rounded, not its number of steps: 300 are 334 and 400 are 500."""
    scheduler = DDIMScheduler(**COMPVIS)
    for asked, done in ((300, 334), (400, 500)):
        assert len(compvis("schedule")[f"ddim.timesteps.{asked}"]) == done
        scheduler.set_timesteps(asked)
        assert len(scheduler.timesteps) == asked


def test_the_numbers_of_steps_that_compvis_cannot_do():
    """Whole ranges of numbers, 3 among them, are an `IndexError` at timestep 1000; above 1000 the stride is zero."""
    ranges = compvis_meta()["notes"]["ddim_uniform_S_ranges_that_index_alphas_cumprod[1000]"]
    assert [3, 3] in ranges
    scheduler = DDIMScheduler(**COMPVIS)
    for count in (count for first, last in ranges for count in range(first, min(last, 999) + 1)):
        scheduler.set_timesteps(count)
        assert len(scheduler.timesteps) == count
        assert scheduler.timesteps[0] <= 999
    refused("steps_offset=1", scheduler.set_timesteps, 1000)
    refused("num_inference_steps=1001", scheduler.set_timesteps, 1001)

"""Both stages and the pipeline on a GPU, held against the CPU. `-m soak` rehearses the same tests on the CPU."""

import math

import pytest
import torch

from ldm_lab.pipeline import LDMPipeline
from tests.trained import final_weights, metrics, train
from tests.training.test_resume import STAGES, interrupt, status

RECIPE = "experiment=celebahq"
GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
# Options of configs/trainer.
TRAINERS = pytest.mark.parametrize(
    "trainer", [pytest.param("gpu", marks=GPU), pytest.param("cpu", marks=pytest.mark.soak)]
)
DEVICES = {"gpu": "cuda", "cpu": "cpu"}


def assert_like_that_on_the_cpu(run, reference):
    """The first losses follow from the same images and numbers; later ones from weights that rounding has moved."""
    for stage in STAGES:
        own, expected = metrics(run / stage), metrics(reference / stage)
        assert own.keys() == expected.keys()
        first, last = min(own), max(own)
        assert own[first]["train/loss"] == pytest.approx(expected[first]["train/loss"], rel=0.02)
        assert own[last]["val/loss"] == pytest.approx(expected[last]["val/loss"], rel=0.15)
        assert all(math.isfinite(value) for row in own.values() for value in row.values())
        assert status(run / stage)["finished"]


@TRAINERS
@pytest.mark.parametrize("experiment", ["celebahq", "lsun_churches"])  # VQ, and KL with a measured scale
def test_both_stages_train_as_on_the_cpu(tiny_runs, tmp_path, trainer, experiment):
    train(tmp_path, f"experiment={experiment}", f"trainer={trainer}")
    assert_like_that_on_the_cpu(tmp_path / experiment, tiny_runs / experiment)


@TRAINERS
@pytest.mark.parametrize("latents", ["cached", "online"])
def test_both_stages_train_in_bfloat16(tiny_runs, tmp_path, trainer, latents):
    train(tmp_path, RECIPE, f"trainer={trainer}", "trainer.precision=bf16-mixed", f"data.latents={latents}")
    assert_like_that_on_the_cpu(tmp_path / "celebahq", tiny_runs / "celebahq")
    for stage in STAGES:
        for state in final_weights(tmp_path / "celebahq" / stage).values():
            assert all(tensor.dtype == torch.float32 for tensor in state.values() if tensor.is_floating_point())


@TRAINERS
def test_an_interrupted_run_continues(tiny_runs, tmp_path, trainer):
    for stage in STAGES:
        with pytest.raises(SystemExit):
            train(tmp_path, RECIPE, f"trainer={trainer}", *interrupt(stage, 24))
    train(tmp_path, RECIPE, f"trainer={trainer}")
    assert_like_that_on_the_cpu(tmp_path / "celebahq", tiny_runs / "celebahq")


def draw(pipe):
    """`(4, 3, 32, 32)` in [0, 1], of numbers that are the same on every device, on the CPU."""
    generators = [torch.Generator().manual_seed(index) for index in range(4)]
    pipe.set_progress_bar_config(disable=True)
    return pipe(batch_size=4, generator=generators, num_inference_steps=4, eta=1.0, output_type="pt").images.cpu()


@TRAINERS
@pytest.mark.parametrize(
    ("experiment", "compiled"), [("celebahq", False), ("lsun_churches", False), ("celebahq", True)]
)
def test_samples_are_those_of_the_cpu(tiny_runs, trainer, experiment, compiled):
    expected = draw(LDMPipeline.from_pretrained(tiny_runs / experiment))
    pipe = LDMPipeline.from_pretrained(tiny_runs / experiment).to(DEVICES[trainer])
    if compiled:
        pipe.compile()
    for images in [draw(pipe), draw(pipe)]:  # the second call may reuse the memory of the first
        # Convolutions in TF32 round to 11 bits; and a latent that lies between two codes may get the other one.
        assert ((images - expected).abs() < 0.02).float().mean() > 0.98

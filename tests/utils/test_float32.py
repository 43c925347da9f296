"""TF32: on where a GPU trains and samples, off where numbers are compared, and never a CPU's business."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy

from ldm_lab.config.compose import compose_sample
from ldm_lab.metrics import reconstruction
from ldm_lab.metrics.extractors import exactly
from ldm_lab.tools import samplers
from ldm_lab.tools.benchmark import contest
from ldm_lab.training.neighbours import Neighbours
from ldm_lab.training.trainer import Trainer
from ldm_lab.utils import float32
from tests.helpers import GOLDEN
from tests.trained import train

CPU = torch.device("cpu")
QUIET = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}


def settings():
    return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32


TF32, EXACT = ("high", True), ("highest", False)


@pytest.fixture(autouse=True)
def on():
    """TF32 is allowed; and afterwards as it was before."""
    products, convolutions = settings()
    float32.allow("high")
    assert settings() == TF32
    yield
    torch.set_float32_matmul_precision(products)
    torch.backends.cudnn.allow_tf32 = convolutions


@pytest.fixture
def gpu(monkeypatch):
    """A trainer believes that it is on a GPU."""
    monkeypatch.setattr(SingleDeviceStrategy, "root_device", property(lambda _: torch.device("cuda", 0)))


@pytest.fixture
def seen(monkeypatch):
    """`seen(owner, name)` lets a function note the settings in which it is called; all notes are in `seen.notes`."""
    notes = []

    def watch(owner, name):
        function = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, **k: notes.append(settings()) or function(*a, **k))

    watch.notes = notes
    return watch


def test_exact_ends_as_it_began_also_in_an_error():
    with float32.exact():
        assert settings() == EXACT
        with float32.exact():
            pass
        assert settings() == EXACT
    assert settings() == TF32
    with pytest.raises(ZeroDivisionError), float32.exact():
        1 / 0  # noqa: B018
    assert settings() == TF32
    float32.allow("highest")
    with float32.exact():
        assert settings() == EXACT
    assert settings() == EXACT


@pytest.mark.parametrize(("precision", "expected"), [("highest", EXACT), ("high", TF32), ("medium", ("medium", True))])
def test_a_trainer_on_a_gpu_sets_it(gpu, precision, expected):
    Trainer(**QUIET, float32_matmul_precision=precision)
    assert settings() == expected


def test_high_is_the_default(gpu):
    float32.allow("highest")
    Trainer(**QUIET)
    assert settings() == TF32
    assert compose_sample(["ckpt=x"]).trainer.float32_matmul_precision == "high"


def test_a_trainer_on_a_cpu_leaves_it_alone():
    """There `high` is TF32, and `medium` bfloat16, where a processor has them."""
    float32.allow("highest")
    Trainer(**QUIET, float32_matmul_precision="medium")
    assert settings() == EXACT


def test_another_precision_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"trainer\.float32_matmul_precision=tf32: must be one of highest, high"):
        train(tmp_path, "experiment=avatars/autoencoder", "trainer.float32_matmul_precision=tf32")


def test_metrics_are_exact(seen):
    with exactly(CPU):
        assert settings() == EXACT
    seen(reconstruction, "structural_similarity_index_measure")
    reconstruction.ssim(*torch.rand(2, 1, 3, 16, 16))
    assert seen.notes == [EXACT]
    assert settings() == TF32


def test_nearest_images_are_found_exactly(seen):
    seen(torch, "cdist")
    images = [{"image": torch.rand(3, 16, 16)} for _ in range(4)]

    class Images(list):
        flip = False

    data = SimpleNamespace(num_train=4, train_set=Images(images))
    search = Neighbours(samples=1, nearest=1)
    search._searched = torch.stack([one["image"] for one in images])
    search.beside(SimpleNamespace(datamodule=data), torch.rand(1, 3, 16, 16))
    assert seen.notes == [EXACT]


def test_samplers_are_compared_exactly(seen, capsys):
    seen(samplers, "latents")
    samplers.main([str(GOLDEN / "diffusers" / "ldm_tiny"), "--seeds=1", "--steps=2", "--sampler=ddim", "--reference=2"])
    assert seen.notes == [EXACT, EXACT]
    assert settings() == TF32


def test_outputs_of_a_benchmark_are_compared_exactly_and_timed_as_they_are_used(monkeypatch):
    for name in ("reset_peak", "peak"):
        monkeypatch.setattr(contest.memory, name, lambda device: 0)
    monkeypatch.setattr(contest, "synchronize", lambda device: None)
    runs = []

    def run():
        runs.append(settings())
        return torch.tensor(len(runs))

    made = [contest.Contestant("", run)]
    (timing,) = contest.measure(made, 2, torch.device("cuda"), compiled=False)
    assert set(runs[:-1]) == {TF32}
    assert runs[-1] == EXACT
    assert timing.output == len(runs)
    assert len(timing.seconds) == 2
    before = len(runs)
    contest.measure(made, 2, CPU, compiled=False)
    assert runs[before:] == [TF32] * 3  # a CPU has nothing to do again
